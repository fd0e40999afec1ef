"""Where up is: a network that lets every place of an equirectangular image vote, and what it is trained with.

    image -> histograms of edge directions -> convolutions that wrap
          -> at each place a vector in the frame (east, south, outward) of that place
          -> turned into the frame of the image, weighted by solid angle, summed -> v;   up = v / |v|,   kappa = |v|

Votes are vectors, so turning the camera about its own vertical axis by the network's stride turns the estimate by exactly as
much: yaw, which cannot be seen, is nothing that the network has to learn. The sum's length is the concentration of a von
Mises-Fisher distribution, so an image without cues, whose votes cancel, says so by itself.

Paper: Chen et al., arXiv 2304.05556, whose orientation module is not described in what could be read; front end and head are our
own.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere import pixel_directions, solid_angles, wrap_convolutions
from lightning_plugins.models.panoramic_upright.orientation_histograms import OrientationHistograms

_COLOURS = 3
_LATITUDE = 2  # sine and cosine
# Most bins of most cells are empty: this makes what is in them as large as the differences between colours.
_HISTOGRAM_SCALE = 4.0


class OrientationNetwork(nn.Module):
    """The up-vector of equirectangular images.

    Args:
        widths: channels after each halving of the histograms.
        blocks: residual blocks at the coarsest size.
        bins: edge directions that the histograms tell apart.
        cell: pixels of the image on each side of a histogram's cell.

    Raises:
        InputError: for a number that is out of range.
    """

    def __init__(self, widths: tuple[int, ...] = (48, 96, 128), blocks: int = 2, bins: int = 16, cell: int = 4) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or blocks < 0:
            raise InputError(f"widths must be positive numbers of channels, got {widths}, and blocks 0 or more, got {blocks}")
        self.histograms = OrientationHistograms(bins, cell)
        sizes = (bins + _COLOURS + _LATITUDE, *widths)
        self.stride = cell * 2 ** len(widths)
        self.down = nn.Sequential(*(_block(before, after, stride=2) for before, after in pairwise(sizes)))
        self.blocks = nn.ModuleList(
            nn.Sequential(_block(widths[-1], widths[-1]), nn.Conv2d(widths[-1], widths[-1], 3, padding=1, bias=False))
            for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(widths[-1]) for _ in range(blocks))
        self.votes = nn.Conv2d(widths[-1], 3, 1, bias=False)
        wrap_convolutions(self)

    def forward(self, image: Tensor) -> Tensor:
        """Return the vector whose direction is up, in the frame of ``engines.sphere``, and whose length is the concentration.

        Args:
            image: ``(B, 3, H, W)``, sRGB in [0, 1]; H and W divisible by ``stride``.

        Returns:
            ``(B, 3)``.

        Raises:
            InputError: for another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % self.stride or image.shape[3] % self.stride:
            raise InputError(
                f"image must have shape (B, 3, H, W) with H and W divisible by {self.stride}, got {tuple(image.shape)}; resize it"
            )
        features = self.down(self.cells(image))
        for block, norm in zip(self.blocks, self.norms, strict=True):
            features = F.relu(features + norm(block(features)))
        return _sum_votes(self.votes(features))

    def cells(self, image: Tensor) -> Tensor:
        """Return what the convolutions see: ``(B, bins + 5, H / cell, W / cell)``, edge directions, colours and latitude."""
        colours = F.avg_pool2d(image, self.histograms.cell) - 0.5
        return torch.cat([_HISTOGRAM_SCALE * self.histograms(image), colours, _latitude(colours)], dim=1)


def _block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )


def _latitude(image: Tensor) -> Tensor:
    up = pixel_directions(image.shape[2], 1, dtype=image.dtype, device=image.device)[..., 2]  # (H, 1)
    both = torch.stack([up, (1 - up.square()).clamp(min=0).sqrt()])
    return both.expand(image.shape[0], -1, -1, image.shape[3])  # len() would fix the batch in exported programs


def _sum_votes(votes: Tensor) -> Tensor:
    """Sum vectors (east, south, outward) of all places, ``(B, 3, h, w)``, in the frame of the image."""
    height, width = votes.shape[-2:]
    outward = pixel_directions(height, width, dtype=votes.dtype, device=votes.device)
    x, y, z = outward.unbind(-1)
    radius = torch.hypot(x, y)
    east = torch.stack([y / radius, -x / radius, torch.zeros_like(x)], dim=-1)  # to the right in the image
    south = torch.stack([x / radius * z, y / radius * z, -radius], dim=-1)  # downwards in the image
    frame = torch.stack([east, south, outward])
    weight = solid_angles(height, width, dtype=votes.dtype, device=votes.device)[:, None]
    return torch.einsum("bkhw,khwc,hw->bc", votes, frame, weight.expand(height, width))


def geodesic_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the angles between vectors in radians, exact for small ones too; differentiable but at 0 and pi.

    Args:
        one: ``(..., 3)``, of any length but zero.
        other: likewise.

    Returns:
        ``(...)``.
    """
    cross = torch.linalg.cross(one, other)
    square = cross.square().sum(-1)
    # The square root has no slope at 0: there the distance is 0 or pi, and gets no gradient.
    sine = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    return torch.atan2(sine, (one * other).sum(-1))


def von_mises_fisher_loss(vector: Tensor, up: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of up-vectors under von Mises-Fisher distributions on the sphere.

    Its density is kappa / (4 pi sinh kappa) exp(kappa cos angle).

    Args:
        vector: ``(B, 3)``, kappa times the mean direction.
        up: ``(B, 3)``, unit vectors.
    """
    # The root has no slope at 0, where the density is even.
    kappa = (vector.square().sum(-1) + 1e-12).sqrt()
    # log(4 pi sinh(kappa) / kappa) - kappa = log(2 pi (1 - exp(-2 kappa)) / kappa)
    log_partition = math.log(2 * math.pi) + torch.log(-torch.expm1(-2 * kappa)) - kappa.log()
    return (log_partition + kappa - (vector * up).sum(-1)).mean()


def expected_error_deg(vector: Tensor) -> Tensor:
    """Return by how many degrees an estimate expects to be wrong: the angle of the root mean square chord of its distribution.

    The mean cosine is coth(kappa) - 1 / kappa, so that this is some 81 degrees over the root of kappa where kappa is large, and
    90 where there is no cue at all.

    Args:
        vector: ``(B, 3)``, what ``OrientationNetwork`` returns.

    Returns:
        ``(B,)``.
    """
    kappa = vector.norm(dim=-1).clamp(min=1e-4)
    cosine = 1 / torch.tanh(kappa) - 1 / kappa
    return torch.rad2deg(2 * torch.asin(((1 - cosine).clamp(min=0) / 2).sqrt()))
