"""Lookup tables of upright images: for each pixel of the level image, the direction in which the tilted one is read.

    table[v, u] = R^T d(v, u),    R = rotation_from_up(up),    d(v, u) = (m_x e_x, m_x e_y, m_z)
                = m_x[v] (e_x[u] R_0 + e_y[u] R_1) + m_z[v] R_2

with m the directions of one column (a meridian), e those of one row (the equator) and R_i the rows of R. The table is linear in
the nine numbers of R, and ``AnalyticLookupTable`` evaluates just that. ``LearnedLookupTable`` is a network for the same map.
``sample_equirectangular(image, table)`` reads the level image from the tilted one.

Paper: Chen, Li, Li, arXiv 2304.05556: a converter block with upsampling generates the table while the network runs. We had its
abstract only; the layers are ours. The tables hold unit vectors instead of pixel coordinates, which jump at the seam and the
poles and cannot be interpolated there.

An up-vector of -z has no smallest rotation. As it is approached from azimuth a, R tends to the half turn about the horizontal
axis across a, another one from every side; at -z itself it is the half turn about x. No continuous network follows that from
the up-vector alone, so the learned one reads R: it is as exact there as elsewhere, and its gradient grows as R's does.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import check_size, pixel_directions
from lightning_plugins.engines.sphere.padding import pad_equirectangular
from lightning_plugins.engines.sphere.rotation import rotation_from_up

# Tables, and pixels of each, that a block's 27 weights per component are fitted to.
FIT_TABLES = 8
FIT_PIXELS = 4096
# Per equation. Neighbouring directions are nearly equal: without it the convolutions' weights grow large and cancel.
RIDGE = 1e-10


class AnalyticLookupTable(nn.Module):
    """The exact table, ``(B, 3) -> (B, height, width, 3)``, of up-vectors of any length but zero; differentiable.

    Computes and answers in the precision of its buffers: float32, or what the module was moved to. Mixed precision does not
    touch it. Nothing of it is saved in checkpoints.

    Cost: one multiplication and addition per number of the table, and no memory beside the table.

    Args:
        height: rows of the level image; the tilted one may have another size.
        width: columns of the level image.

    Raises:
        InputError: if a size is below 1, or, when called, if up is not ``(B, 3)``.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        check_size(height, width)
        self.height = height
        self.width = width
        self.meridian: Tensor
        self.equator: Tensor
        self.register_buffer("meridian", pixel_directions(height, 1).squeeze(1), persistent=False)
        self.register_buffer("equator", pixel_directions(1, width).squeeze(0), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.height}, {self.width}"

    def forward(self, up: Tensor) -> Tensor:
        rotation = _rotation(up, self.meridian.dtype)
        # Planes (B, 3, H, W) in memory: the sampling reads x, y and z apart.
        row = rotation[:, 0, :, None] * self.equator[:, 0] + rotation[:, 1, :, None] * self.equator[:, 1]
        column = rotation[:, 2, :, None] * self.meridian[:, 2]
        planes = torch.addcmul(column[..., None], self.meridian[:, 0, None], row[..., None, :])
        return planes.movedim(1, -1)


class LearnedLookupTable(nn.Module):
    """A network for the table, ``(B, 3) -> (B, height, width, 3)``: unit vectors, which ``fit_lookup_table`` makes right.

    A perceptron gives a coarse grid of unit vectors, each block doubles it. It is for training jointly with what reads the
    table; ``AnalyticLookupTable`` is exact and cheaper. It computes in its weights' precision, or autocast's.

    Args:
        height: rows of the level image, a multiple of ``2 ** blocks``.
        width: columns of the level image, a multiple of ``2 ** (blocks + 1)``.
        blocks: upsampling blocks; the coarse grid has ``height / 2 ** blocks`` rows.
        hidden: units of the perceptron.

    Raises:
        InputError: if a size does not fit, an option is below 1, or, when called, if up is not ``(B, 3)``.
    """

    def __init__(self, height: int, width: int, blocks: int = 3, hidden: int = 64) -> None:
        super().__init__()
        check_size(height, width)
        if blocks < 1 or hidden < 1:
            raise InputError(f"blocks and hidden must be 1 or more, got {blocks} and {hidden}")
        step = 2**blocks
        if height % step or width % (2 * step):
            raise InputError(
                f"a table with {blocks} blocks needs rows in multiples of {step} and columns in multiples of {2 * step}, "
                f"got {height} x {width}; take another size or fewer blocks"
            )
        self.height = height
        self.width = width
        self.coarse_shape = (3, height // step, width // step)
        self.hidden = nn.Linear(9, hidden)
        self.converter = nn.Linear(hidden, math.prod(self.coarse_shape))
        self.blocks = nn.ModuleList(_UpsamplingBlock() for _ in range(blocks))

    def units(self, up: Tensor) -> Tensor:
        """Return what the perceptron's hidden units make of R, ``(B, hidden)``."""
        return F.silu(self.hidden(_rotation(up, self.hidden.weight.dtype).flatten(1)))

    def coarse(self, units: Tensor) -> Tensor:
        """Return the coarse grid of unit vectors, ``(B, 3, height / 2 ** blocks, width / 2 ** blocks)``."""
        return F.normalize(self.converter(units).unflatten(1, self.coarse_shape), dim=1)

    def forward(self, up: Tensor) -> Tensor:
        planes = self.coarse(self.units(up))
        for block in self.blocks:
            planes = block(planes)
        return planes.movedim(1, -1)


class _UpsamplingBlock(nn.Module):
    """Double a grid of unit vectors ``(B, 3, H, W)``: bilinear over the seam and the poles, corrected by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Conv2d(3, 3, 3, bias=False)
        nn.init.zeros_(self.refine.weight)  # starts as plain interpolation, which is nearly right

    def forward(self, planes: Tensor) -> Tensor:
        doubled = self.double_padded(planes)
        return F.normalize(doubled[..., 1:-1, 1:-1] + self.refine(doubled), dim=1)

    @staticmethod
    def double_padded(planes: Tensor) -> Tensor:
        """Return the interpolated grid with one ring around it, ``(B, 3, 2 H + 2, 2 W + 2)``."""
        # The vectors are fixed in the camera, not along the image's axes: beyond a pole they keep their sign.
        padded = pad_equirectangular(planes, 1)
        # Of the two rings around the doubled grid the outer one was interpolated from one side alone.
        return F.interpolate(padded, scale_factor=2.0, mode="bilinear", align_corners=False)[..., 1:-1, 1:-1]


@torch.no_grad()
def fit_lookup_table(table: LearnedLookupTable, seed: int = 0) -> None:
    """Fit a learned table, in place, to the analytic one, without descent: each layer by least squares, coarse to fine.

    First the perceptron's last layer on the coarse grid, whose directions its units nearly span; then each block's convolution,
    so that it adds what the interpolation of the grid before it lacks. A second or two at 256 x 512.

    Args:
        table: of any state; its perceptron's first layer stays.
        seed: of the up-vectors, drawn uniformly from the sphere.
    """
    # In float64, so that machines agree also in the weights that hardly matter to the table.
    fitted = copy.deepcopy(table).double()
    generator = torch.Generator().manual_seed(seed)
    # Sixteen equations per unknown.
    up = torch.randn(16 * fitted.hidden.out_features, 3, generator=generator).to(fitted.hidden.weight)
    units = fitted.units(up)
    solution = _least_squares(F.pad(units, (0, 1), value=1.0), _exact_planes(up, *fitted.coarse_shape[1:]).flatten(1))
    fitted.converter.weight.copy_(solution[:-1].T)
    fitted.converter.bias.copy_(solution[-1])

    up, planes = up[:FIT_TABLES], fitted.coarse(units[:FIT_TABLES])
    for block in fitted.blocks:
        assert isinstance(block, _UpsamplingBlock)
        doubled = block.double_padded(planes)
        interpolated = doubled[..., 1:-1, 1:-1]
        missing = _exact_planes(up, *interpolated.shape[2:]) - interpolated
        drawn = torch.randint(missing[0, 0].numel(), (FIT_PIXELS,), generator=generator).to(up.device)
        patches, missing = (part[..., drawn].transpose(1, 2).flatten(0, 1) for part in (F.unfold(doubled, 3), missing.flatten(2)))
        block.refine.weight.copy_(_least_squares(patches, missing).T.view_as(block.refine.weight))
        planes = block(planes)
    table.load_state_dict(fitted.state_dict())


def _exact_planes(up: Tensor, height: int, width: int) -> Tensor:
    return AnalyticLookupTable(height, width).to(up)(up).movedim(-1, 1)


def _least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Return the X of ``matrix X = target`` that keeps small where the columns depend on each other."""
    rows, columns = matrix.shape
    ridge = (RIDGE * rows) ** 0.5 * torch.eye(columns).to(matrix)
    return torch.linalg.lstsq(torch.cat([matrix, ridge]), F.pad(target, (0, 0, 0, columns))).solution


def _rotation(up: Tensor, dtype: torch.dtype) -> Tensor:
    if up.ndim != 2 or up.shape[1] != 3:
        raise InputError(f"up must have shape (B, 3), got {tuple(up.shape)}; give one x, y, z per image")
    return rotation_from_up(up.to(dtype))
