"""Resampling between equirectangular images and points on the sphere.

``sample_equirectangular`` reads an image in any directions, which may carry gradients. ``Resample`` goes between two fixed
places, with its indices and weights computed once. All weights sum to one. Coordinates that lie within rounding errors of a
pixel centre are moved onto it, so that the identity and turns by whole pixels return the image's own numbers.
Cost: one read per tap (nearest 1, bilinear 4, bicubic 16, from points 3) of each target and channel.
"""

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import directions_to_pixels
from lightning_plugins.engines.sphere.domains import Domain, EquirectangularGrid, SpherePoints
from lightning_plugins.engines.sphere.interpolation import Interpolation
from lightning_plugins.engines.sphere.padding import pad_equirectangular
from lightning_plugins.engines.sphere.tables import MARGINS, grid_table, margin_of, padded_taps, points_table


def sample_equirectangular(image: Tensor, directions: Tensor, mode: str = "bilinear") -> Tensor:
    """Sample an equirectangular image in given directions, correctly at the seam and the poles.

    Args:
        image: ``(B, C, H, W)``; differentiable.
        directions: ``(N, 3)`` or ``(H', W', 3)`` for all images alike, or ``(B, H', W', 3)``; of any length but zero;
            differentiable unless the mode is nearest. Their dtype sets the precision of the coordinates.
        mode: ``nearest``, ``bilinear`` or ``bicubic``.

    Returns:
        ``(B, C, N)`` or ``(B, C, H', W')``, in the image's dtype.

    Raises:
        InputError: if a shape or the mode is none of these, W is odd, or integers are to be interpolated.
    """
    if image.ndim != 4:
        raise InputError(f"image must have shape (B, C, H, W), got {tuple(image.shape)}; add the missing axes with [None]")
    batch, _, height, width = image.shape
    if directions.ndim not in (2, 3, 4) or (directions.ndim == 4 and directions.shape[0] != batch):
        raise InputError(
            f"directions must have shape (N, 3), (H, W, 3) or ({batch}, H, W, 3), got {tuple(directions.shape)}; "
            f"for a set of points per image give ({batch}, 1, N, 3)"
        )
    if mode != "nearest" and not image.is_floating_point():
        raise InputError(f"mode {mode} needs floating point values, got {image.dtype}; convert with .float(), or take nearest")
    return sample_padded(pad_equirectangular(image, margin_of(mode)), directions, height, width, mode)


def sample_padded(padded: Tensor, directions: Tensor, height: int, width: int, mode: str) -> Tensor:
    """Sample as ``sample_equirectangular`` does, an image that is padded by ``MARGINS[mode]`` already: for reading it often.

    Args:
        padded: ``(B, C, height + 2 margin, width + 2 margin)``; of integers, such as 8-bit pixels, only taps are converted.
        directions: as for ``sample_equirectangular``.
        height: rows of the image before padding.
        width: columns of the image before padding.
        mode: as for ``sample_equirectangular``.

    Returns:
        As ``sample_equirectangular``; integers become floating point values of the directions' dtype, unless the mode is nearest.

    Raises:
        InputError: if the mode is another.
    """
    batch, channels = padded.shape[:2]
    pixels = _snap(directions_to_pixels(directions, height, width), width)
    base, across, down = padded_taps(pixels, height, width, mode)
    source = padded.flatten(2)
    dtype = padded.dtype if padded.is_floating_point() or mode == "nearest" else directions.dtype
    stride = width + 2 * MARGINS[mode]
    shape = base.shape if directions.ndim < 4 else base.shape[1:]
    # (B or 1, 1, targets): one map for all channels, and for all images where they share it.
    index = base.reshape(-1, 1, shape.numel()).expand(batch, channels, -1)
    across, down = ([weight.to(dtype).reshape(-1, 1, shape.numel()) for weight in weights] for weights in (across, down))
    rows = []
    for row in range(len(down)):
        taps = [source[..., row * stride + column :].gather(2, index).to(dtype) for column in range(len(across))]
        rows.append(_weighted_sum(taps, across))
    return _weighted_sum(rows, down).unflatten(2, shape)


def _weighted_sum(terms: list[Tensor], weights: list[Tensor]) -> Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total = torch.addcmul(total, term, weight)
    return total


def _snap(pixels: Tensor, width: int) -> Tensor:
    tolerance = 4 * torch.finfo(pixels.dtype).eps * width
    error = pixels.detach().round() - pixels.detach()
    return pixels + error.masked_fill(error.abs() > tolerance, 0.0)


class Resample(nn.Module):
    """Fixed resampling ``(B, C, *source.shape) -> (B, C, *target.shape)``, made by one of its three constructors.

    The result has the values' dtype; see ``Interpolation`` for the precision in between. Nothing of it is saved in checkpoints:
    the tables follow from the arguments.
    """

    def __init__(self, source: Domain, target: Domain, index: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.source = source
        self.target = target
        row = torch.arange(target.node_count)[:, None].expand_as(index)
        self.interpolation = Interpolation(row, index, weight, (target.node_count, source.node_count))

    @classmethod
    def grid_to_points(cls, height: int, width: int, points: Tensor, mode: str = "bilinear") -> "Resample":
        """Read an equirectangular grid at points ``(N, 3)``: ``(B, C, height, width) -> (B, C, N)``."""
        source, target = EquirectangularGrid(height, width), SpherePoints(points)
        pixels = _snap(directions_to_pixels(target.directions(), height, width), width)
        return cls(source, target, *grid_table(pixels, height, width, mode))

    @classmethod
    def points_to_grid(cls, points: Tensor, height: int, width: int, neighbours: int = 3) -> "Resample":
        """Interpolate points ``(N, 3)`` on an equirectangular grid: ``(B, C, N) -> (B, C, height, width)``."""
        return cls._from_points(SpherePoints(points), EquirectangularGrid(height, width), neighbours)

    @classmethod
    def points_to_points(cls, points: Tensor, targets: Tensor, neighbours: int = 3) -> "Resample":
        """Interpolate points ``(N, 3)`` at others ``(M, 3)``: ``(B, C, N) -> (B, C, M)``.

        ``neighbours`` 3 is linear in the triangle around, 1 the nearest point; 4 or more average, for pooling onto a coarser set.
        """
        return cls._from_points(SpherePoints(points), SpherePoints(targets), neighbours)

    @classmethod
    def _from_points(cls, source: SpherePoints, target: Domain, neighbours: int) -> "Resample":
        return cls(source, target, *points_table(source.directions(), target.directions(), neighbours, source.spacing_rad))

    def extra_repr(self) -> str:
        return f"{self.source} -> {self.target}"

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[2:] != self.source.shape:
            shape = ", ".join(map(str, self.source.shape))
            raise InputError(f"this Resample reads (B, C, {shape}), got {tuple(values.shape)}; make one for that size")
        table = values.flatten(2).transpose(1, 2)
        result = torch.stack([self.interpolation(image) for image in table.unbind()])
        # Signals on points keep their channels last in memory, as the next layer reads them; images go to planar convolutions.
        result = result.transpose(1, 2)
        return result.contiguous().unflatten(2, self.target.shape) if len(self.target.shape) == 2 else result
