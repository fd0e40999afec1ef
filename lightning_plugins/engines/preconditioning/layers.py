"""Layers as sums of outer products: what a Kronecker-factored or per-example method must know of a module, and nothing else.

A layer multiplies rows by a weight matrix: ``y_nt = W a_nt``, for example ``n`` at position ``t`` (of a sequence, of an image).
The gradient of its weight is ``sum_nt delta_nt a_nt^T`` with ``delta_nt = dL/dy_nt``. Shapes, here and in the methods:

    B  blocks of the weight: the groups of a convolution, 1 otherwise
    N  examples   R  positions   I  inputs (with a last one that is always 1 where there is a bias)   O  outputs
    inputs a_BNRI      output gradients d_BNRO      weight and gradient w_BOI

Convolutions see patches as inputs (Grosse and Martens, 2016); a transposed one multiplies its input by patches of the output, so
there the patches are on the side of the gradient. Modules called several times add to the same sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_plugins.engines.preconditioning.gradients import read_gradient, write_gradient

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spread_patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int], mode: str
) -> Tensor:
    """Return the patches under a convolution's kernel, a view of the padded input as far as torch can make one.

    Args:
        x: ``(N, C, *space)``.
        padding: zeros, or what ``mode`` says, before and after each axis: ``(before, after)`` from the last axis to the first,
            as :func:`torch.nn.functional.pad` takes them.

    Returns:
        ``(N, C, *positions, *kernel)``.
    """
    if any(padding):
        x = functional.pad(x, list(padding), mode="constant" if mode == "zeros" else mode)
    for axis, (size, step, spacing) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, spacing * (size - 1) + 1, step)[..., ::spacing]
    return x


def _padding(module: Convolution) -> list[int]:
    """Return what a convolution pads, in the order of :func:`torch.nn.functional.pad`; ``same`` puts the odd one after."""
    padding = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding += [total // 2, total - total // 2]
        elif module.padding == "valid":
            padding += [0, 0]
        else:
            padding += [int(module.padding[axis])] * 2
    return padding


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)


@dataclass(eq=False)
class Layer:
    """A module whose parameters one method preconditions together.

    Attributes:
        name: of the module, as in ``named_modules``.
        module: the module; its hooks deliver the rows.
        kind: ``linear``, ``convolution``, ``transposed convolution``, ``embedding`` or ``norm``.
        weight: the parameter that is a matrix (of a norm: its scale).
        bias: the parameter that belongs to the always-one input, or None.
        rows_in: turns the module's input into ``a_BNRI``.
        rows_out: turns the gradient of its output into ``d_BNRO``.
    """

    name: str
    module: nn.Module
    kind: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    rows_in: Callable[[Tensor], Tensor]
    rows_out: Callable[[Tensor], Tensor]
    blocks: int = 1
    parameters: tuple[nn.Parameter, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, O, I)`` of the weight with its bias as the last column."""
        if self.kind == "norm":
            return self.weight.numel(), 1, len(self.parameters)
        rows, columns = self._matrix(torch.empty(self.weight.shape, device="meta")).shape[1:]
        return self.blocks, rows, columns + (self.bias is not None)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the rows ``a_BNRI`` of an input of the module."""
        return self.rows_in(x)

    def output_gradients(self, gradient: Tensor) -> Tensor:
        """Return the rows ``d_BNRO`` of the gradient of an output of the module."""
        return self.rows_out(gradient)

    def gradient(self) -> Tensor:
        """Return ``.grad`` of weight and bias as one matrix ``w_BOI``; both must have one."""
        return self.joined(*(read_gradient(parameter) for parameter in self.parameters))

    def joined(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return tensors of the shapes of weight and bias as one matrix ``w_BOI``."""
        matrix = self._matrix(weight)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(self.blocks if self.kind != "norm" else -1, matrix.shape[1], 1)], dim=-1)

    def write(self, matrix: Tensor) -> None:
        """Copy a matrix ``w_BOI`` into the gradients."""
        columns = matrix.shape[-1] - (self.bias is not None)
        weight = matrix[..., :columns]
        if self.kind == "transposed convolution":
            weight = weight.transpose(1, 2)
        elif self.kind == "embedding":
            weight = weight[0].mT
        write_gradient(self.weight, weight)
        if self.bias is not None:
            write_gradient(self.bias, matrix[..., -1])

    def _matrix(self, weight: Tensor) -> Tensor:
        if self.kind == "norm":
            return weight.reshape(-1, 1, 1)
        if self.kind == "transposed convolution":  # (in, out per group, *kernel): the input rows select, so they are the columns
            return weight.reshape(self.blocks, weight.shape[0] // self.blocks, -1).transpose(1, 2)
        if self.kind == "embedding":  # (vocabulary, out): one-hot inputs
            return weight.mT.unsqueeze(0)
        return weight.reshape(self.blocks, weight.shape[0] // self.blocks, -1)


def _parameter(value: Tensor | nn.Module | None) -> nn.Parameter:
    assert isinstance(value, nn.Parameter)
    return value


def _linear(name: str, module: nn.Linear) -> Layer:
    def rows(x: Tensor) -> Tensor:
        x = x.unsqueeze(0) if x.ndim == 1 else x
        return x.reshape(1, x.shape[0], -1, x.shape[-1])

    bias = module.bias
    return Layer(
        name,
        module,
        "linear",
        _parameter(module.weight),
        bias,
        (lambda x: _with_ones(rows(x))) if bias is not None else rows,
        rows,
    )


def _channel_rows(x: Tensor, groups: int, axes: int) -> Tensor:
    """``(N, C, *space)`` as ``(groups, N, positions, C / groups)``; an input without a batch axis is one example."""
    x = x.unsqueeze(0) if x.ndim == axes + 1 else x
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).permute(1, 0, 3, 2)


def _patch_rows(patches: Tensor, groups: int, axes: int) -> Tensor:
    """``(N, C, *positions, *kernel)`` as ``(groups, N, positions, C / groups * kernel)``, in the order of the weight."""
    patches = patches.unflatten(1, (groups, -1))  # N, g, c, *positions, *kernel
    positions = tuple(range(3, 3 + axes))
    kernel = tuple(range(3 + axes, 3 + 2 * axes))
    ordered = patches.permute(1, 0, *positions, 2, *kernel)
    return ordered.flatten(2 + axes).flatten(2, 1 + axes)


def _convolution(name: str, module: Convolution) -> Layer:
    axes = len(module.kernel_size)
    padding = _padding(module)
    bias = None if module.bias is None else _parameter(module.bias)

    def rows_in(x: Tensor) -> Tensor:
        x = x.unsqueeze(0) if x.ndim == axes + 1 else x
        patches = spread_patches(x, module.kernel_size, module.stride, module.dilation, padding, module.padding_mode)
        rows = _patch_rows(patches, module.groups, axes)
        return _with_ones(rows) if module.bias is not None else rows

    def rows_out(gradient: Tensor) -> Tensor:
        return _channel_rows(gradient, module.groups, axes)

    return Layer(name, module, "convolution", _parameter(module.weight), bias, rows_in, rows_out, module.groups)


def _transposed_convolution(name: str, module: TransposedConvolution) -> Layer:
    axes = len(module.kernel_size)
    padding = [int(module.padding[axis]) for axis in reversed(range(axes)) for _ in range(2)]

    def rows_in(x: Tensor) -> Tensor:
        return _channel_rows(x, module.groups, axes)

    def rows_out(gradient: Tensor) -> Tensor:
        gradient = gradient.unsqueeze(0) if gradient.ndim == axes + 1 else gradient
        patches = spread_patches(gradient, module.kernel_size, module.stride, module.dilation, padding, "zeros")
        # output_padding leaves positions at the end under which no input stands: the kernel may fit there once more.
        sizes = [
            (gradient.shape[2 + axis] - module.output_padding[axis] + 2 * int(module.padding[axis])
             - module.dilation[axis] * (module.kernel_size[axis] - 1) - 1) // module.stride[axis] + 1
            for axis in range(axes)
        ]  # fmt: skip
        for axis, size in enumerate(sizes):
            patches = patches.narrow(2 + axis, 0, size)
        return _patch_rows(patches, module.groups, axes)

    # The bias adds to every pixel of the output, not once per input row: it is no column of this matrix and stays plain.
    return Layer(name, module, "transposed convolution", _parameter(module.weight), None, rows_in, rows_out, module.groups)


def _embedding(name: str, module: nn.Embedding) -> Layer:
    """The rows of an embedding stay indices ``(1, N, R, 1)``: one-hot vectors are never built."""

    def rows_in(x: Tensor) -> Tensor:
        x = x.unsqueeze(0) if x.ndim == 0 else x
        return x.reshape(1, x.shape[0], -1, 1)

    def rows_out(gradient: Tensor) -> Tensor:
        gradient = gradient.unsqueeze(0) if gradient.ndim == 1 else gradient
        return gradient.reshape(1, gradient.shape[0], -1, gradient.shape[-1])

    return Layer(name, module, "embedding", _parameter(module.weight), None, rows_in, rows_out)


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``x`` as the norm's scale sees it: with the statistics of the module, never from its output divided by the scale."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training or module.running_mean is None:
            return functional.batch_norm(x, None, None, training=True, eps=module.eps)
        return functional.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    assert isinstance(module, nn.RMSNorm)
    return functional.rms_norm(x, module.normalized_shape, eps=module.eps)


def _norm(name: str, module: nn.Module) -> Layer:
    """A norm's scale and shift: every feature is a block of one output and two inputs, the normalized feature and 1."""
    channels_first = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)

    def rows(x: Tensor) -> Tensor:  # (F, N, R, 1)
        if channels_first:
            return x.reshape(x.shape[0], x.shape[1], -1).permute(1, 0, 2).unsqueeze(-1)
        return x.reshape(x.shape[0], -1, weight.numel()).permute(2, 0, 1).unsqueeze(-1)

    def rows_in(x: Tensor) -> Tensor:
        normalized = rows(_normalized(module, x))
        return _with_ones(normalized) if bias is not None else normalized

    return Layer(name, module, "norm", weight, bias, rows_in, rows, weight.numel())


def norm_example_gradients(layer: Layer, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``(N, B, I)``, the sums over positions of ``d_BNRO a_BNRI`` of a norm, without the copies that its rows take."""
    normalized, gradient = _normalized(layer.module, x).to(dtype), gradient.to(dtype)
    sums = [normalized * gradient] + ([] if layer.bias is None else [gradient])
    if isinstance(layer.module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return torch.stack([each.reshape(*x.shape[:2], -1).sum(2) for each in sums], dim=-1)
    return torch.stack([each.reshape(x.shape[0], -1, layer.weight.numel()).sum(1) for each in sums], dim=-1)


def _weight_and_bias(module: nn.Module) -> tuple[object, object]:
    return getattr(module, "weight", None), getattr(module, "bias", None)


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """Return the layer that a module is, or None if its parameters keep the plain gradient.

    A weight that is computed (``torch.nn.utils.parametrizations``, weight and spectral norm) is no parameter, and no layer here.
    """
    if any(isinstance(value, Tensor) and not isinstance(value, nn.Parameter) for value in _weight_and_bias(module)):
        return None
    if isinstance(module, nn.Linear):
        return _linear(name, module)
    if isinstance(module, CONVOLUTIONS):
        return _convolution(name, module)
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return _transposed_convolution(name, module)
    if isinstance(module, nn.Embedding):
        return _embedding(name, module)
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
        return _norm(name, module) if getattr(module, "weight", None) is not None else None
    return None
