"""Spherical convolution: a kernel of a centre and rings of points at equal angular distance.

The kernel is defined at the north pole, ring r with M_r points at angular distance rho_r and azimuths 2 pi m / M_r, and carried to every node by
Rz(azimuth) Ry(colatitude): azimuth 0 of the kernel then points south along the node's meridian. At the poles, where every meridian
meets, it is that of the forward direction. The signal is read at the carried points by interpolation, and one matrix product follows:

    y[n] = bias + sum_k W_k x(R_n q_k)          anisotropic: a weight per point, the centre's first
    y[n] = bias + W_0 x(R_n q_0) + sum_r W_r mean_m x(R_n q_rm)          isotropic: a weight per ring

The anisotropic kernel follows the meridians: it commutes with turns about the vertical alone. The isotropic one commutes with every rotation, up
to interpolation. On a grid the table of a row is one pattern, shifted by whole columns, so that rolling the input rolls the output exactly.

Papers: the circular kernel is that of Liu et al., "Distortion-aware depth ... with a spherical teacher-student network" (arXiv 2405.16858), of which we know
the description only; tangent-plane kernels: Coors et al., "SphereNet", ECCV 2018. Radii are in units of the node spacing.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import directions_to_pixels
from lightning_plugins.engines.sphere.domains import Domain, EquirectangularGrid
from lightning_plugins.engines.sphere.tables import grid_taps, points_taps


class SphericalConv2d(nn.Module):
    """Convolution on a sphere, ``(B, in_channels, *domain.shape) -> (B, out_channels, *domain.shape)``.

    Args:
        in_channels: channels read.
        out_channels: channels written.
        domain: where the signal lives.
        rings: ``(count, radius)`` of each ring, the radius in units of the domain's node spacing.
        isotropic: one weight per ring instead of one per point.
        bias: whether to add one.

    Raises:
        InputError: if a ring is empty, or its radius not between 0 and half a turn.
    """

    index: Tensor
    interpolation: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        domain: Domain,
        rings: Sequence[tuple[int, float]] = ((8, 1.0),),
        isotropic: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.rings = tuple((int(count), float(radius)) for count, radius in rings)
        self.isotropic = isotropic
        taps = 1 + (len(self.rings) if isotropic else sum(count for count, _ in self.rings))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, taps))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self._set_domain(domain)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as Conv2d does: uniform within 1 / sqrt(fan in)."""
        bound = 1 / math.sqrt(self.in_channels * self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def spacing_rad(self) -> float:
        """The angular distance that a radius of 1 stands for."""
        return self.domain.spacing_rad

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self.domain}, rings={self.rings}, isotropic={self.isotropic}, bias={self.bias is not None}"

    def with_domain(self, domain: Domain) -> "SphericalConv2d":
        """Return this convolution on another domain, sharing weight and bias."""
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        other = copy.deepcopy(self, {**shared, id(self.domain): self.domain})
        other._set_domain(domain)
        return other

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[2:] != self.domain.shape or values.shape[1] != self.in_channels:
            raise InputError(
                f"this SphericalConv2d reads (B, {self.in_channels}, {', '.join(map(str, self.domain.shape))}), got {tuple(values.shape)}; "
                f"with_domain(...) gives one for another size"
            )
        table = values.flatten(2).transpose(1, 2)
        nodes, taps, sources = self.index.shape
        gathered = table.index_select(1, self.index.flatten()).view(len(values), nodes, taps, sources, self.in_channels)
        samples = torch.einsum("bnksc,nks->bnkc", gathered, self.interpolation)
        kernel = self.weight.permute(2, 1, 0).flatten(0, 1)
        result = samples.flatten(2) @ kernel
        if self.bias is not None:
            result = result + self.bias
        return result.transpose(1, 2).unflatten(2, self.domain.shape)

    def _set_domain(self, domain: Domain) -> None:
        self.domain = domain
        index, weight = _kernel_table(domain, self.rings, self.isotropic)
        self.register_buffer("index", index.to(self.weight.device), persistent=False)
        self.register_buffer("interpolation", weight.to(self.weight), persistent=False)


def kernel_points(rings: Sequence[tuple[int, float]], spacing_rad: float) -> Tensor:
    """Return the kernel's points about the north pole, the centre first, shape ``(1 + sum of counts, 3)``, float64.

    Raises:
        InputError: if a ring is empty, or its radius not between 0 and half a turn.
    """
    points = [torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)]
    for count, radius in rings:
        angle = radius * spacing_rad
        if count < 1 or not 0 < angle < math.pi:
            raise InputError(
                f"a ring needs 1 point or more and an angle in (0, 180) degrees, got {count} points at {radius} node spacings, "
                f"which is {math.degrees(angle):.1f} degrees here; use a smaller radius or a finer domain"
            )
        azimuth = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        height = torch.full_like(azimuth, math.cos(angle))
        points.append(torch.stack((math.sin(angle) * azimuth.cos(), math.sin(angle) * azimuth.sin(), height), dim=-1))
    return torch.cat(points)


def carry_kernel(kernel: Tensor, nodes: Tensor) -> Tensor:
    """Return kernel points ``(K, 3)`` carried to nodes ``(N, 3)`` by Rz(azimuth) Ry(colatitude), shape ``(N, K, 3)``."""
    x, y, z = nodes.unbind(-1)
    radius = torch.hypot(x, y)
    is_pole = radius < 1e-9
    radius = radius.masked_fill(is_pole, 1.0)
    # At a pole the meridian is that of the forward direction: azimuth 0.
    cosine, sine = (x / radius).masked_fill(is_pole, 1.0), (y / radius).masked_fill(is_pole, 0.0)
    radius = radius.masked_fill(is_pole, 0.0)
    south = torch.stack((z * cosine, z * sine, -radius), dim=-1)
    east = torch.stack((-sine, cosine, torch.zeros_like(z)), dim=-1)
    return torch.einsum("kj,njd->nkd", kernel, torch.stack((south, east, nodes), dim=1))


def _kernel_table(domain: Domain, rings: Sequence[tuple[int, float]], isotropic: bool) -> tuple[Tensor, Tensor]:
    kernel = kernel_points(rings, domain.spacing_rad)
    if isinstance(domain, EquirectangularGrid):
        index, weight = _grid_table(domain, kernel)
    else:
        targets = carry_kernel(kernel, domain.directions())
        index, weight = points_taps(domain.directions(), targets.flatten(0, 1), 3, domain.spacing_rad)
        index, weight = (part.unflatten(0, targets.shape[:2]) for part in (index, weight))
    if isotropic:
        return _merge_rings(index, weight, [count for count, _ in rings])
    return index, weight


def _grid_table(domain: EquirectangularGrid, kernel: Tensor) -> tuple[Tensor, Tensor]:
    height, width = domain.shape
    first_column = domain.directions().view(height, width, 3)[:, 0]
    pixels = directions_to_pixels(carry_kernel(kernel, first_column), height, width)
    row, column, weight = grid_taps(pixels[..., 0], pixels[..., 1], height, width, "bilinear")
    # One pattern a row, moved by whole columns: rolling the input rolls the output, bit for bit.
    shifts = torch.arange(width)[None, :, None, None]
    index = row[:, None] * width + (column[:, None] + shifts).remainder(width)
    return index.flatten(0, 1), weight[:, None].expand(index.shape).flatten(0, 1)


def _merge_rings(index: Tensor, weight: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    sources = index.shape[2]
    width = max([1, *counts]) * sources
    indices, weights = [], []
    for part_index, part_weight, count in zip(
        index.split([1, *counts], 1), weight.split([1, *counts], 1), [1, *counts], strict=True
    ):
        flat_index, flat_weight = part_index.flatten(1), part_weight.flatten(1) / count
        missing = width - count * sources
        indices.append(torch.nn.functional.pad(flat_index, (0, missing)))
        weights.append(torch.nn.functional.pad(flat_weight, (0, missing)))
    return torch.stack(indices, 1), torch.stack(weights, 1)
