"""Equirectangular padding for the convolutions and poolings of any network, in place.

A hook before each layer pads its input as ``pad_equirectangular`` does, and the layer itself pads no more. Parameters, their
names and the layers' classes stay, save for timm's ``...Same`` layers, which pad in their forward and become their plain parents.
A network whose total stride is s then commutes with rolls of its input by multiples of s columns.
Only layers that pad by themselves are seen: padding in a network's own forward, or in timm's BlurPool2d, is left as it is.
"""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_plugins.engines.sphere.padding import Sides, pad_sides

Padded = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d
_PLAIN = {"Conv2dSame": nn.Conv2d, "MaxPool2dSame": nn.MaxPool2d, "AvgPool2dSame": nn.AvgPool2d}


def wrap_convolutions(module: nn.Module) -> int:
    """Give every Conv2d, MaxPool2d and AvgPool2d inside ``module`` equirectangular padding, in place.

    Returns:
        How many layers were changed; those that do not pad, or were changed before, do not count.
    """
    changed = 0
    for layer in module.modules():
        if not isinstance(layer, Padded):
            continue
        pad = _padding_of(layer)
        if pad is not None:
            layer.register_forward_pre_hook(pad)
            _stop_padding(layer)
            changed += 1
    return changed


@dataclass(frozen=True)
class _Fixed:
    """Hook that pads by fixed numbers of rows and columns."""

    rows: Sides
    columns: Sides

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (pad_sides(inputs[0], self.rows, self.columns), *inputs[1:])


@dataclass(frozen=True)
class _Same:
    """Hook that pads for ceil(size / stride) pixels of output, as timm's 'same' layers do; each field is (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        height, width = inputs[0].shape[-2:]
        return (pad_sides(inputs[0], self._sides(0, height), self._sides(1, width)), *inputs[1:])

    def _sides(self, axis: int, size: int) -> Sides:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return _halves(max((math.ceil(size / self.stride[axis]) - 1) * self.stride[axis] + reach - size, 0))


def _padding_of(layer: Padded) -> _Fixed | _Same | None:
    kernel, dilation = _pair(layer.kernel_size), _pair(getattr(layer, "dilation", 1))
    if type(layer).__name__ in _PLAIN or getattr(layer, "same_pad", False):
        return _Same(kernel, _pair(layer.stride), dilation)
    if layer.padding == "same":
        rows, columns = (_halves(dilation[axis] * (kernel[axis] - 1)) for axis in (0, 1))
    elif layer.padding == "valid":
        return None
    else:
        rows, columns = ((size, size) for size in _pair(layer.padding))
    return _Fixed(rows, columns) if max(*rows, *columns) else None


def _stop_padding(layer: Padded) -> None:
    plain = _PLAIN.get(type(layer).__name__)
    if plain is not None:
        layer.__class__ = plain
    if hasattr(layer, "same_pad"):
        layer.same_pad = False  # type: ignore[assignment]
    layer.padding = (0, 0)
    if isinstance(layer, nn.Conv2d):
        layer.padding_mode = "zeros"


def _pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, tuple | list) else (int(value), int(value))


def _halves(total: int) -> Sides:
    return (total // 2, total - total // 2)
