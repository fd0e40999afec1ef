"""Padding of equirectangular images: columns wrap at the seam, rows mirror over the poles.

The row beyond a pole is the row before it, seen from across the pole: the mirrored row, half a turn around.

    padded[-1 - i, u] = image[i, u + W/2]        padded[H + i, u] = image[H - 1 - i, u + W/2]        columns modulo W

``wrap_convolutions`` gives this padding to the convolutions and poolings of any network: a hook before each pads, and the module itself
pads no more. Parameters and their names stay. A network of stride s then commutes with rolls of its input by multiples of s.
Scalar features only: those that hold components along the image axes would have to change sign beyond a pole.
Cost: one copy of the image forward, one of its gradient backward.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError


def pad_equirectangular(image: Tensor, padding: int | tuple[int, int]) -> Tensor:
    """Pad an equirectangular image on all four sides.

    Args:
        image: ``(..., H, W)``.
        padding: pixels on each side, or ``(rows, columns)``.

    Returns:
        ``(..., H + 2 rows, W + 2 columns)``.

    Raises:
        InputError: if the padding is negative, exceeds the image, or rows are padded at an odd width.
    """
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    return _pad(image, (rows, rows), (columns, columns))


def _pad(image: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    height, width = image.shape[-2:]
    if min(rows + columns) < 0 or max(rows) > height or max(columns) > width:
        raise InputError(
            f"padding must be between 0 and the image's size, got rows {rows} and columns {columns} for {height} x {width}; pad less"
        )
    if max(rows) and width % 2:
        raise InputError(f"rows beyond a pole need an even width (they are rolled by half of it), got {width}; resize the image")
    parts = [image]
    if rows[0]:
        parts.insert(0, image[..., : rows[0], :].flip(-2).roll(width // 2, -1))
    if rows[1]:
        parts.append(image[..., height - rows[1] :, :].flip(-2).roll(width // 2, -1))
    if len(parts) > 1:
        image = torch.cat(parts, dim=-2)
    if max(columns):
        image = torch.cat((image[..., width - columns[0] :], image, image[..., : columns[1]]), dim=-1)
    return image


@dataclass(frozen=True)
class _Window:
    """How a convolution or pooling pads: sizes as (rows, columns); ``fixed`` is None where 'same' padding follows the input's size."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    fixed: tuple[tuple[int, int], tuple[int, int]] | None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows, columns = self.fixed or (self._same(0, inputs[0].shape[-2]), self._same(1, inputs[0].shape[-1]))
        return (_pad(inputs[0], rows, columns), *inputs[1:])

    def _same(self, axis: int, size: int) -> tuple[int, int]:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        total = max((math.ceil(size / self.stride[axis]) - 1) * self.stride[axis] + reach - size, 0)
        return total // 2, total - total // 2


def wrap_convolutions(module: nn.Module) -> int:
    """Give every Conv2d, MaxPool2d and AvgPool2d inside ``module`` equirectangular padding, in place.

    Subclasses count too, and so do timm's variants that pad to the 'same' size. Modules that pad their input in other ways (timm's
    BlurPool2d) are left alone.

    Returns:
        How many modules were changed; those that never pad, or are changed already, do not count.
    """
    changed = 0
    for layer in module.modules():
        if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            continue
        window = _window(layer)
        if window is None:
            continue
        layer.register_forward_pre_hook(window)
        _stop_padding(layer)
        changed += 1
    return changed


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pads_to_same(layer: nn.Module) -> bool:
    return type(layer).__name__ in ("Conv2dSame", "MaxPool2dSame", "AvgPool2dSame") or bool(getattr(layer, "same_pad", False))


def _window(layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> _Window | None:
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    dilation = _pair(getattr(layer, "dilation", 1))
    if _pads_to_same(layer):
        return _Window(kernel, stride, dilation, None)
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return None
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        rows, columns = ((t // 2, t - t // 2) for t in total)
    else:
        rows, columns = ((p, p) for p in _pair(layer.padding))
    return _Window(kernel, stride, dilation, (rows, columns)) if max(rows + columns) else None


def _stop_padding(layer: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> None:
    if getattr(layer, "same_pad", False):
        layer.same_pad = False  # type: ignore[assignment]
    elif _pads_to_same(layer):
        plain = next(kind for kind in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if isinstance(layer, kind))
        layer.__class__ = plain  # type: ignore[assignment]
    layer.padding = (0, 0)
    if isinstance(layer, nn.Conv2d):
        layer.padding_mode = "zeros"
