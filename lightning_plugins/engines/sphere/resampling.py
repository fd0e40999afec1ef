"""Resampling between equirectangular images and points on the sphere.

``sample_equirectangular`` reads an image in any directions, which may need gradients. ``Resample`` does the same, and the other ways round,
between two fixed places, with its indices and weights computed once. All weights sum to one.

Coordinates within a few rounding errors of a pixel centre are moved onto it, so that the identity and turns by whole pixels return the
image's own numbers.
Cost: one read per tap (nearest 1, bilinear 4, bicubic 16, points 3) of each target and channel.
"""

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import directions_to_pixels
from lightning_plugins.engines.sphere.domains import EquirectangularGrid, SpherePoints
from lightning_plugins.engines.sphere.tables import grid_taps, points_taps


def sample_equirectangular(image: Tensor, directions: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample an equirectangular image in given directions, correctly at the seam and the poles.

    Args:
        image: ``(B, C, H, W)``; differentiable.
        directions: ``(N, 3)`` or ``(H', W', 3)`` for all images, or ``(B, H', W', 3)`` for each its own; differentiable unless the mode is nearest.
        mode: ``nearest``, ``bilinear`` or ``bicubic``.

    Returns:
        ``(B, C, N)`` or ``(B, C, H', W')``.

    Raises:
        InputError: if a shape or the mode is none of these.
    """
    if image.ndim != 4:
        raise InputError(f"image must have shape (B, C, H, W), got {tuple(image.shape)}; add the missing axes with [None]")
    batch, channels, height, width = image.shape
    if directions.ndim not in (2, 3, 4) or (directions.ndim == 4 and directions.shape[0] != batch):
        raise InputError(
            f"directions must have shape (N, 3), (H, W, 3) or ({batch}, H, W, 3), got {tuple(directions.shape)}; "
            f"for a set of points per image give ({batch}, 1, N, 3)"
        )
    u, v = _snap(directions_to_pixels(directions, height, width), width).unbind(-1)
    row, column, weight = grid_taps(u, v, height, width, mode)
    index = row * width + column.remainder(width)
    weight = weight.to(image.dtype)
    pixels = image.flatten(2)
    result = image.new_zeros(())
    for tap in range(index.shape[-1]):
        result = result + _gather(pixels, index[..., tap]) * weight[..., tap].unsqueeze(1 if directions.ndim == 4 else 0)
    return result


def _gather(pixels: Tensor, index: Tensor) -> Tensor:
    if index.ndim < 3:
        return pixels.index_select(2, index.flatten()).unflatten(2, index.shape)
    flat = index.flatten(1)[:, None].expand(-1, pixels.shape[1], -1)
    return pixels.gather(2, flat).unflatten(2, index.shape[1:])


def _snap(pixels: Tensor, width: int) -> Tensor:
    tolerance = 4 * torch.finfo(pixels.dtype).eps * width
    error = pixels.detach().round() - pixels.detach()
    return pixels + error.masked_fill(error.abs() > tolerance, 0.0)


class Resample(nn.Module):
    """Fixed resampling ``(B, C, *source) -> (B, C, *target)``; make one with a ``..._to_...`` constructor.

    The tables are buffers that are not saved: they follow the module between devices and are rebuilt from the arguments.
    """

    index: Tensor
    weight: Tensor

    def __init__(self, index: Tensor, weight: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        super().__init__()
        self.source = source
        self.target = target
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("weight", weight.to(torch.get_default_dtype()), persistent=False)

    @classmethod
    def grid_to_points(cls, height: int, width: int, points: Tensor, mode: str = "bilinear") -> "Resample":
        """Read an equirectangular grid at points ``(N, 3)``: ``(B, C, height, width) -> (B, C, N)``."""
        domain = SpherePoints(points)
        pixels = _snap(directions_to_pixels(domain.directions(), height, width), width)
        row, column, weight = grid_taps(pixels[:, 0], pixels[:, 1], height, width, mode)
        return cls(row * width + column.remainder(width), weight, (height, width), domain.shape)

    @classmethod
    def points_to_grid(cls, points: Tensor, height: int, width: int, neighbours: int = 3) -> "Resample":
        """Interpolate points ``(N, 3)`` on an equirectangular grid: ``(B, C, N) -> (B, C, height, width)``."""
        source, target = SpherePoints(points), EquirectangularGrid(height, width)
        index, weight = points_taps(source.directions(), target.directions(), neighbours, source.spacing_rad)
        return cls(index, weight, source.shape, target.shape)

    @classmethod
    def points_to_points(cls, points: Tensor, targets: Tensor, neighbours: int = 3) -> "Resample":
        """Interpolate points ``(N, 3)`` at others ``(M, 3)``: ``(B, C, N) -> (B, C, M)``."""
        source, target = SpherePoints(points), SpherePoints(targets)
        index, weight = points_taps(source.directions(), target.directions(), neighbours, source.spacing_rad)
        return cls(index, weight, source.shape, target.shape)

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}, taps={self.index.shape[1]}"

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[2:] != self.source:
            raise InputError(
                f"this Resample reads (B, C, {', '.join(map(str, self.source))}), got {tuple(values.shape)}; build another"
            )
        flat = values.flatten(2)
        result = sum(flat.index_select(2, self.index[:, tap]) * self.weight[:, tap] for tap in range(self.index.shape[1]))
        assert isinstance(result, Tensor)
        return result.unflatten(2, self.target)
