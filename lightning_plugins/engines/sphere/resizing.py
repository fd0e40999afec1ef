"""Resizing equirectangular images without a seam, between any two sizes, odd ones too.

Target pixel j reads the sources i with the weights of a triangle around its centre, normalised to sum 1 (per axis):

    w_ij ~ max(0, 1 - |i + 1/2 - (j + 1/2) s| / max(s, 1)),        s = sources / targets

That is bilinear interpolation where it enlarges, and where it shrinks a filter as wide as two target pixels. Columns wrap at the
seam. A row beyond a pole is the row as far before it, read half a turn around: for an odd width between two columns, with the
same triangle. The weights are exact for every ratio, so that nothing is padded or cropped.
Cost: a read of the image for every weight of the rows (2 H in all where it shrinks), and a fraction of that for the columns.
"""

from math import ceil

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.interpolation import Interpolation


def resize_equirectangular(image: Tensor, height: int, width: int) -> Tensor:
    """Return ``image`` at another size, bilinear with antialiasing, continuous across the seam and the poles.

    Args:
        image: ``(B, C, H, W)``, floating point, of any height and width; differentiable.
        height: rows of the result.
        width: columns of the result.

    Raises:
        InputError: if the image has another shape, another dtype or no pixels, or a size is below 1.
    """
    if image.ndim != 4 or 0 in image.shape:
        raise InputError(
            f"image must have shape (B, C, H, W) without a 0, got {tuple(image.shape)}; add missing axes with [None]"
        )
    if not image.is_floating_point():
        raise InputError(f"resizing needs floating point values, got {image.dtype}; convert them with .float()")
    if height < 1 or width < 1:
        raise InputError(f"height and width must be 1 or more, got {height} and {width}; a panorama is twice as wide as high")
    source = (image.shape[2], image.shape[3])
    if source == (height, width):
        return image.clone()
    resize = _Resize(source, (height, width)).to(image)
    return torch.stack([resize(planes) for planes in image.unbind()])


class _Resize(nn.Module):
    """The tables of one pair of sizes, applied to one image ``(C, H, W)``."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        row, place, weight = _triangles(source[0], target[0])
        place = place.remainder(2 * source[0])
        over = place >= source[0]
        place = torch.where(over, 2 * source[0] - 1 - place, place)
        # Rows that read beyond a pole, and what they read there.
        self.touched = ((weight != 0) & over).any(dim=1).nonzero().squeeze(1)
        self.rows = Interpolation(row, place, weight.masked_fill(over, 0.0), (target[0], source[0]))
        number = torch.arange(len(self.touched))[:, None].expand(-1, weight.shape[1])
        beyond = weight.masked_fill(~over, 0.0)[self.touched]
        self.beyond = Interpolation(number, place[self.touched], beyond, (len(self.touched), source[0]))
        self.columns, self.opposite = (_columns(source[1], target[1], turn) for turn in (0.0, source[1] / 2))

    def forward(self, planes: Tensor) -> Tensor:
        table = planes.transpose(0, 1).flatten(1)
        within = self._across(self.columns, self.rows(table), planes)
        if len(self.touched):
            within.index_add_(1, self.touched.to(planes.device), self._across(self.opposite, self.beyond(table), planes))
        return within.permute(2, 1, 0).contiguous()

    @staticmethod
    def _across(columns: Interpolation, rows: Tensor, planes: Tensor) -> Tensor:
        """Return rows ``(h, C * W)`` read across, ``(w, h, C)``."""
        channels, _, width = planes.shape
        values = rows.view(-1, channels, width).permute(2, 0, 1)
        return columns(values.flatten(1)).unflatten(1, (-1, channels))


def _columns(sources: int, targets: int, turn: float) -> Interpolation:
    row, place, weight = _triangles(sources, targets, turn)
    return Interpolation(row, place.remainder(sources), weight, (targets, sources))


def _triangles(sources: int, targets: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return target, source (also beyond the ends) and weight of every entry, ``(targets, taps)``, moved by ``shift`` sources."""
    scale = sources / targets
    reach = max(scale, 1.0)
    centre = (torch.arange(targets, dtype=torch.float64)[:, None] + 0.5) * scale + shift
    source = (centre - reach).floor() + torch.arange(ceil(2 * reach) + 1)
    weight = (1 - (source + 0.5 - centre).abs() / reach).clamp(min=0)
    target = torch.arange(targets)[:, None].expand(source.shape)
    return target, source.long(), weight / weight.sum(dim=1, keepdim=True)
