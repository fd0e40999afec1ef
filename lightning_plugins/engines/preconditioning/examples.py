"""Per-example gradients of a layer: what methods that square or pair them, and do not sum over rows alone, must keep.

    P_n = sum over calls and positions of d_nr a_nr^T       (O x I), the gradient of the loss of example ``n``

A module that is called several times in one backward pass brings more positions of the same examples, so nothing may be squared
before the pass is over. Until then the inputs and output gradients are kept as they came (references, no copies); rows are made
of them a few examples at a time, so that patches and ``P_n`` take no more than the chunk size. Shapes as in ``layers.py``.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import statistics_dtype
from lightning_plugins.engines.preconditioning.factors import CHUNK_BYTES
from lightning_plugins.engines.preconditioning.layers import Layer, norm_example_gradients


class Rows(NamedTuple):
    """Some examples of a step.

    Attributes:
        first: index of the first of them among those of the step.
        inputs: ``a_BNRI``; of an embedding the tokens, ``(1, N, R, 1)``.
        gradients: ``d_BNRO``, of one term's loss.
    """

    first: int
    inputs: Tensor
    gradients: Tensor

    @property
    def indices(self) -> slice:
        """Where they stand among the examples of the step."""
        return slice(self.first, self.first + self.inputs.shape[1])

    @property
    def is_embedding(self) -> bool:
        return not self.inputs.is_floating_point()


class _Call(NamedTuple):
    """What one call of a module brought, batch axis first; ``version`` tells whether the input was overwritten since."""

    x: Tensor
    gradient: Tensor
    scale: float
    version: int


class Examples:
    """The examples of one layer, over the calls of a pass and the passes of a step.

    Calls of one pass with equally many examples are taken for the same examples; others count as examples of their own.

    Args:
        layer: whose rows they have.

    Attributes:
        dtype: of the rows: float32 for half precision.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.dtype = statistics_dtype(layer.weight.dtype)
        self._open: list[_Call] = []
        self._passes: list[tuple[int, list[_Call]]] = []

    def add(self, x: Tensor, gradient: Tensor, scale: float) -> None:
        """Keep a module's input and the gradient of its output; divided by ``scale`` it is that of one term's loss."""
        if self.layer.kind == "norm":
            # A feature's P_n is two numbers: fewer than its positions, and batch statistics need the batch whole.
            x = norm_example_gradients(self.layer, x, gradient, self.dtype)
            gradient = gradient.new_ones(*x.shape[:2], 1)
        else:
            x, gradient = _with_batch_axis(self.layer, x, gradient)
        self._open.append(_Call(x, gradient, scale, x._version))

    def finish_pass(self, first: int = 0) -> int:
        """End a backward pass, whose examples are numbered from ``first``; return how many there were."""
        groups: dict[int, list[_Call]] = {}
        for call in self._open:
            groups.setdefault(len(call.x), []).append(call)
        start = first
        for count in sorted(groups, reverse=True):
            self._passes.append((start, groups[count]))
            start += count
        self._open = []
        return start - first

    def clear(self) -> None:
        """Drop all examples."""
        self._open, self._passes = [], []

    def rows(self) -> Iterator[Rows]:
        """Yield all examples of finished passes, a few at a time.

        Raises:
            InputError: if an input was overwritten since its backward pass.
        """
        for first, calls in self._passes:
            count, size = len(calls[0].x), self._chunk(calls)
            for start in range(0, count, size):
                parts = [self._rows(call, start, min(size, count - start)) for call in calls]
                inputs, gradients = zip(*parts, strict=True)
                if len(parts) == 1:
                    yield Rows(first + start, inputs[0], gradients[0])
                else:
                    yield Rows(first + start, torch.cat(inputs, dim=2), torch.cat(gradients, dim=2))

    def _rows(self, call: _Call, start: int, count: int) -> tuple[Tensor, Tensor]:
        if call.x._version != call.version:
            raise InputError(
                f"the input of {self.layer.name} was overwritten between its backward pass and the optimizer step, and the "
                "method needs it until then; give every batch a tensor of its own"
            )
        x, gradient = call.x.narrow(0, start, count), call.gradient.narrow(0, start, count)
        if self.layer.kind == "norm":  # (n, B, I) and (n, B, 1)
            return x.movedim(1, 0).unsqueeze(2) / call.scale, gradient.movedim(1, 0).unsqueeze(2).to(self.dtype)
        inputs, gradients = self.layer.inputs(x), self.layer.output_gradients(gradient).to(self.dtype) / call.scale
        if self.layer.kind != "embedding":
            return inputs.to(self.dtype), gradients
        padding = self.layer.module.padding_idx
        return inputs, gradients if padding is None else gradients * (inputs != padding)

    def _chunk(self, calls: list[_Call]) -> int:
        """Return how many examples at a time keep rows, and ``P_n`` where it must be made, within the chunk size."""
        layer = self.layer
        taps = math.prod(layer.module.kernel_size) if layer.kind.endswith("convolution") else 1  # type: ignore[arg-type]
        one_position = layer.kind == "linear" and len(calls) == 1 and calls[0].x.ndim == 2
        entries = 0 if one_position or layer.kind == "embedding" else math.prod(layer.shape)
        for call in calls:
            entries += call.x[0].numel() * (taps if layer.kind == "convolution" else 1)
            entries += call.gradient[0].numel() * (taps if layer.kind == "transposed convolution" else 1)
        return max(1, CHUNK_BYTES // (max(1, entries) * self.dtype.itemsize))


def example_gradients(rows: Rows) -> Tensor:
    """Return ``P_n`` of every example, ``(B, N, O, I)``; not of an embedding, whose ``P_n`` is all but empty."""
    return rows.gradients.mT @ rows.inputs


def sum_of_squares(rows: Rows, vocabulary: int = 0) -> Tensor:
    """Return ``sum_n P_n^2``, entry by entry, as ``w_BOI``.

    Args:
        rows: examples.
        vocabulary: size of an embedding.
    """
    if rows.is_embedding:
        return _embedding_squares(rows, vocabulary)
    if rows.inputs.shape[2] == 1:  # P_n is one outer product, and so is its square
        return rows.gradients.squeeze(2).square().mT @ rows.inputs.squeeze(2).square()
    return example_gradients(rows).square().sum(dim=1)


def _embedding_squares(rows: Rows, vocabulary: int) -> Tensor:
    """Add up the gradients of equal tokens within an example, square, and add up examples: ``(1, O, vocabulary)``."""
    _, examples, positions, out_dim = rows.gradients.shape
    tokens = rows.inputs.reshape(examples, positions)
    owner = torch.arange(examples, device=tokens.device).unsqueeze(1) * vocabulary + tokens
    pairs, index = owner.flatten().unique(return_inverse=True)
    sums = rows.gradients.new_zeros(len(pairs), out_dim).index_add_(0, index, rows.gradients.reshape(-1, out_dim))
    squares = sums.new_zeros(vocabulary, out_dim).index_add_(0, pairs % vocabulary, sums.square_())
    return squares.mT.unsqueeze(0)


def _with_batch_axis(layer: Layer, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Give an input that is a single example its batch axis."""
    axes = len(layer.module.kernel_size) + 1 if layer.kind.endswith("convolution") else 1  # type: ignore[arg-type]
    if x.ndim == (0 if layer.kind == "embedding" else axes):
        return x.unsqueeze(0), gradient.unsqueeze(0)
    return x, gradient
