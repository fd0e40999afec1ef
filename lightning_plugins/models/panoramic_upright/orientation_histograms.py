"""Histograms of edge directions on the sphere: what an equirectangular image shows of up, before anything is learned.

    image -> gradient (east, south) per radian -> structure tensor over the colours -> direction, weighted by contrast
          -> soft bins, averaged over cells

A vertical line of the scene lies on a great circle through up, and its gradient points across that circle. The gradient is
therefore taken in the tangent plane of the sphere, where the stretching of rows towards the poles is undone, and its direction
is known far more finely than a pixel: cells of 4 x 4 pixels keep what a network on pixels would first have to learn.

Contrasts are compressed, m / (m + c), so that faint edges in shadow count beside the bright ones of a window.

Sources: histograms of gradients, Dalal and Triggs 2005; the tensor over colours, Di Zenzo 1986. On the sphere they are ours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere import pixel_directions
from lightning_plugins.engines.sphere.padding import pad_equirectangular

# Scharr's smoothing across a central difference: directions are right to a fraction of a degree where Sobel's are off by several.
SCHARR = (3 / 16, 10 / 16, 3 / 16)
# Half of a bin's width over the distance of two bins: each direction falls into three.
OVERLAP = 1.5


class OrientationHistograms(nn.Module):
    """Edge directions of equirectangular images as histograms; nothing in it is learned, and all of it is differentiable.

    Args:
        bins: directions that are told apart, evenly over half a turn; the first is of edges that run towards the poles.
        cell: rows and columns of pixels that share a histogram.
        contrast: difference of neighbouring pixels, in [0, 1], that counts half of the largest.

    Raises:
        InputError: for a number that is out of range.
    """

    def __init__(self, bins: int = 16, cell: int = 4, contrast: float = 0.03) -> None:
        super().__init__()
        if bins < 4 or cell < 1 or not contrast > 0:
            raise InputError(
                f"bins must be 4 or more, cell 1 or more and contrast above 0, got {bins}, {cell} and {contrast}; "
                "16, 4 and 0.03 are the defaults"
            )
        self.bins = bins
        self.cell = cell
        self.contrast = contrast
        # A bin takes the part of the cosine of twice the angle that exceeds the one at its border: a 1 x 1 convolution.
        centre = torch.arange(bins) * (2 * math.pi / bins)
        border = math.cos(OVERLAP * 2 * math.pi / bins)
        weight = torch.stack([centre.cos(), centre.sin(), torch.full_like(centre, -border)], dim=1) / (1 - border)
        self.weight: Tensor
        self.register_buffer("weight", weight[:, :, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, bins, H / cell, W / cell)``, from 0 without an edge to 1, of images ``(B, C, H, W)`` in [0, 1]."""
        east, south = tangent_gradient(image)
        along, across = (east.square() - south.square()).sum(1), 2 * (east * south).sum(1)
        square = (east.square() + south.square()).sum(1)
        size = (square + 1e-12).sqrt()
        # (along, across) has the length size^2 at twice the edge's angle; what is binned has the length size / (size + contrast).
        moments = torch.stack([along, across, square], dim=-1) / (size * (size + self.contrast)).unsqueeze(-1)
        # Channels last: three times as fast on a CPU.
        binned = F.relu(F.conv2d(moments.permute(0, 3, 1, 2), self.weight.to(moments.dtype)), inplace=True)
        return F.avg_pool2d(binned, self.cell).contiguous()


def tangent_gradient(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient in the tangent plane, towards east and south, per row of pixels (pi / H radians).

    Args:
        image: ``(B, C, H, W)``; differentiable.

    Returns:
        Two tensors of the image's shape.
    """
    height, width = image.shape[-2:]
    padded = pad_equirectangular(image, 1)
    side, middle, _ = SCHARR
    rows = side * (padded[..., :-2, :] + padded[..., 2:, :]) + middle * padded[..., 1:-1, :]
    columns = side * (padded[..., :-2] + padded[..., 2:]) + middle * padded[..., 1:-1]
    # In half precision the rows next to the poles would be stretched without end.
    exact = torch.promote_types(image.dtype, torch.float32)
    height_of_row = pixel_directions(height, 1, dtype=exact, device=image.device)[..., 2]  # (H, 1)
    stretch = (width / (2 * height) / (1 - height_of_row.square()).sqrt()).to(image.dtype)
    return (rows[..., 2:] - rows[..., :-2]) / 2 * stretch, (columns[..., 2:, :] - columns[..., :-2, :]) / 2
