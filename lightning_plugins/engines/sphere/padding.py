"""Padding of equirectangular images: columns wrap at the seam, rows mirror over the poles.

The row beyond a pole is the row before it, seen from across the pole: mirrored, and half a turn around.

    padded[-1 - i, u] = image[i, u + W/2]        padded[H + i, u] = image[H - 1 - i, u + W/2]        columns modulo W

For scalar features: those that hold components along the image's axes would have to change sign beyond a pole.
Cost: one copy of the image forward and one of its gradient backward, about that of padding with zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._support.errors import InputError

Sides = tuple[int, int]


def pad_equirectangular(image: Tensor, padding: int | tuple[int, int]) -> Tensor:
    """Pad an equirectangular image on all four sides.

    Args:
        image: ``(B, C, H, W)``; differentiable.
        padding: pixels on each side, or ``(rows, columns)``.

    Returns:
        ``(B, C, H + 2 rows, W + 2 columns)``.

    Raises:
        InputError: if the padding is negative or exceeds the image, or rows are padded at an odd width.
    """
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return pad_sides(image, (rows, rows), (columns, columns))


def pad_sides(image: Tensor, rows: Sides, columns: Sides) -> Tensor:
    """Pad as ``pad_equirectangular`` does, with its own number of rows above and below, and of columns left and right.

    Raises:
        InputError: as ``pad_equirectangular``.
    """
    if image.ndim < 3:
        raise InputError(f"image must have shape (B, C, H, W), got {tuple(image.shape)}; add the missing axes with [None]")
    height, width = image.shape[-2:]
    if min(*rows, *columns) < 0 or max(rows) > height or max(columns) > width:
        raise InputError(
            f"padding must lie between 0 and the image's {height} x {width} pixels, got rows {rows} and columns {columns}; "
            f"give a larger image or a smaller kernel"
        )
    if max(rows) and width % 2:
        raise InputError(f"rows beyond a pole are rolled by half the width, which must be even, got {width}; resize the image")
    if torch.is_grad_enabled() and image.requires_grad:
        return _Pad.apply(image, rows, columns)
    return _pad(image, rows, columns)


class _Pad(torch.autograd.Function):
    """Written out because autograd would copy the whole gradient once for every border."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image: Tensor, rows: Sides, columns: Sides) -> Tensor:
        return _pad(image, rows, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sides, Sides], output: Tensor) -> None:
        _, ctx.rows, ctx.columns = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _fold(grad, ctx.rows, ctx.columns), None, None


def _pad(image: Tensor, rows: Sides, columns: Sides) -> Tensor:
    (above, below), (left, right) = rows, columns
    height, width = image.shape[-2:]
    half = width // 2
    padded = F.pad(image, (left, right, above, below))
    middle = padded[..., above : above + height, :]
    if left:
        middle[..., :left].copy_(middle[..., width : width + left])
    if right:
        middle[..., left + width :].copy_(middle[..., left : left + right])
    north = padded[..., :above, :], middle[..., :above, :]
    south = padded[..., above + height :, :], middle[..., height - below :, :]
    for border, source in (north, south):
        if border.shape[-2]:
            mirrored = source.flip(-2)
            border[..., : left + half].copy_(mirrored[..., half : left + width])
            border[..., left + half :].copy_(mirrored[..., left : left + right + width - half])
    return padded


def _fold(grad: Tensor, rows: Sides, columns: Sides) -> Tensor:
    above, below = rows
    height, width = grad.shape[-2] - above - below, grad.shape[-1] - sum(columns)
    top, middle, bottom = grad.split((above, height, below), dim=-2)
    image = _fold_columns(middle, columns)
    if above:
        image[..., :above, :].add_(_fold_columns(top, columns).flip(-2).roll(width // 2, -1))
    if below:
        image[..., height - below :, :].add_(_fold_columns(bottom, columns).flip(-2).roll(width // 2, -1))
    return image


def _fold_columns(grad: Tensor, columns: Sides) -> Tensor:
    left, right = columns
    width = grad.shape[-1] - left - right
    image = grad[..., left : left + width].clone(memory_format=torch.contiguous_format)
    if left:
        image[..., width - left :].add_(grad[..., :left])
    if right:
        image[..., :right].add_(grad[..., left + width :])
    return image
