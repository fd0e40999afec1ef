"""Kronecker factors of a layer: ``F ~ G (x) A`` with ``A`` of its inputs and ``G`` of the gradients of its outputs.

With terms ``m`` of the loss (examples, or tokens where the loss averages over tokens) and rows ``n, t``:

    expand    A = sum_nt a a^T / (N R)          G = sum_nt d d^T / terms
    reduce    A = sum_n a~ a~^T / N             G = sum_n d~ d~^T / terms        a~ = mean_t a,  d~ = sum_t d

``d`` is the gradient of one term's loss. Expand is exact for deep linear networks with a loss per position, reduce for those that
average positions before the loss (Eschenhagen et al., 2023). The input factor of an embedding is the diagonal of its tokens'
frequencies. A factor wider than ``max_dim`` becomes block-diagonal: of 4,096 inputs and a cap of 512 eight blocks remain.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_plugins.engines.preconditioning.blocks import State, statistics_dtype
from lightning_plugins.engines.preconditioning.factors import CHUNK_BYTES, RunningMean, second_moment
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.settings import Positions


class KroneckerFactors:
    """Sums and running averages of both factors of one layer.

    Args:
        layer: whose factors they are.
        positions: ``expand`` or ``reduce``.
        decay: of the running averages.
        max_dim: widest block of a factor.
        outputs: False leaves ``G`` the identity (FOOF).

    Attributes:
        inputs: running average of ``A``: ``(B, pieces, i, i)``, or ``(vocabulary,)`` of an embedding.
        outputs: running average of ``G``: ``(B, pieces, o, o)``.
    """

    def __init__(self, layer: Layer, positions: Positions, decay: float, max_dim: int, *, with_outputs: bool = True) -> None:
        self.layer = layer
        self.positions = positions
        self.dtype = statistics_dtype(layer.weight.dtype)
        self.with_outputs = with_outputs
        _, out_dim, in_dim = layer.shape
        self.diagonal_inputs = layer.kind == "embedding"
        # The bias joins the last piece: 512 inputs and a bias stay whole under a cap of 512.
        self.input_pieces = 1 if self.diagonal_inputs else math.ceil((in_dim - (layer.bias is not None)) / max_dim)
        self.output_pieces = math.ceil(out_dim / max_dim)
        self.inputs = RunningMean(decay)
        self.outputs = RunningMean(decay)
        self.rows = 0
        self._input_sum: Tensor | None = None
        self._output_sum: Tensor | None = None

    def accumulate_inputs(self, x: Tensor) -> None:
        """Add the rows of a module's input to the sum of ``a a^T``."""
        layer = self.layer
        if self.diagonal_inputs:
            rows = layer.inputs(x).flatten()
            counts = torch.bincount(rows, minlength=layer.shape[2]).to(self.dtype)
            self.rows += rows.numel()
            self._input_sum = counts if self._input_sum is None else self._input_sum.add_(counts)
            return
        for part in self.parts(x):
            rows = layer.inputs(part).to(self.dtype)
            if self.positions == "reduce":
                rows = rows.mean(dim=2, keepdim=True)
            self.rows += rows.shape[1] * rows.shape[2]
            self._input_sum = _added(self._input_sum, second_moment(split(rows, self.input_pieces), self.dtype))

    def accumulate_output_gradients(self, gradient: Tensor, scale: float) -> None:
        """Add the rows of an output's gradient to the sum of ``d d^T``, for ``d = gradient / scale``."""
        if not self.with_outputs:
            return
        for part in self.parts(gradient) if self.layer.kind == "transposed convolution" else [gradient]:
            rows = self.layer.output_gradients(part).to(self.dtype)
            if self.positions == "reduce":
                rows = rows.sum(dim=2, keepdim=True)
            moment = second_moment(split(rows, self.output_pieces), self.dtype)
            self._output_sum = _added(self._output_sum, moment.mul_(scale**-2))

    def pending(self) -> list[Tensor]:
        """Return the sums of this step; zeros where the layer was not used, so that all ranks agree on what they add."""
        blocks, out_dim, in_dim = self.layer.shape
        like = self.layer.weight
        if self._input_sum is None:
            size = math.ceil(in_dim / self.input_pieces)
            shape = (in_dim,) if self.diagonal_inputs else (blocks, self.input_pieces, size, size)
            self._input_sum = torch.zeros(shape, dtype=self.dtype, device=like.device)
        if not self.with_outputs:
            return [self._input_sum]
        if self._output_sum is None:
            size = math.ceil(out_dim / self.output_pieces)
            self._output_sum = torch.zeros(blocks, self.output_pieces, size, size, dtype=self.dtype, device=like.device)
        return [self._input_sum, self._output_sum]

    def fold(self, rows: int, terms: float) -> None:
        """Take the sums into the running averages, and clear them."""
        sums = self.pending()
        self.inputs.add(sums[0].div_(rows))
        if self.with_outputs:
            self.outputs.add(sums[1].div_(terms))
        self.clear()

    def clear(self) -> None:
        """Drop the sums of this step."""
        self.rows, self._input_sum, self._output_sum = 0, None, None

    def mean_traces(self) -> tuple[Tensor, Tensor]:
        """Return the mean diagonal entries of ``A`` and ``G``, each ``(B,)``."""
        _, out_dim, in_dim = self.layer.shape
        assert self.inputs.value is not None
        if self.diagonal_inputs:
            inputs = self.inputs.value.sum().reshape(1) / in_dim
        else:
            inputs = self.inputs.value.diagonal(dim1=-2, dim2=-1).sum((-1, -2)) / in_dim
        if self.outputs.value is None:
            return inputs, torch.ones_like(inputs)
        return inputs, self.outputs.value.diagonal(dim1=-2, dim2=-1).sum((-1, -2)) / out_dim

    def trace(self) -> Tensor:
        """Return the trace of ``G (x) A``, summed over the blocks of the weight."""
        _, out_dim, in_dim = self.layer.shape
        inputs, outputs = self.mean_traces()
        return (inputs * outputs).sum() * (out_dim * in_dim)

    def blocked(self, gradient: Tensor) -> Tensor:
        """Return a gradient ``w_BOI`` as ``(B, output pieces, input pieces, o, i)``, filled up with zeros."""
        gradient = gradient.to(self.dtype)
        _, out_dim, in_dim = gradient.shape
        o, i = math.ceil(out_dim / self.output_pieces), math.ceil(in_dim / self.input_pieces)
        gradient = _filled(_filled(gradient, i * self.input_pieces).mT, o * self.output_pieces).mT
        return gradient.reshape(-1, self.output_pieces, o, self.input_pieces, i).transpose(2, 3)

    def unblocked(self, blocked: Tensor) -> Tensor:
        """Undo :meth:`blocked`."""
        blocks, out_dim, in_dim = self.layer.shape
        return blocked.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :out_dim, :in_dim].reshape(blocks, out_dim, in_dim)

    def state_dict(self) -> State:
        return {"inputs": self.inputs.state_dict(), "outputs": self.outputs.state_dict()}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.inputs.load_state_dict(state["inputs"], device)
        self.outputs.load_state_dict(state["outputs"], device)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Split a batch so that the patches of a part stay within the chunk size."""
        if not self.layer.kind.endswith("convolution"):
            return [x]
        taps = math.prod(self.layer.module.kernel_size)  # type: ignore[arg-type]
        if x.ndim == self.layer.weight.ndim - 1:  # one example without its axis
            return [x]
        examples = max(1, int(CHUNK_BYTES / max(1, x[0].numel() * taps * 4)))
        return list(x.split(examples))


def split(rows: Tensor, pieces: int) -> Tensor:
    """Return rows ``(B, N, R, F)`` as ``(B, pieces, N R, F / pieces)``, filled up with zeros."""
    rows = rows.flatten(1, 2)
    if pieces == 1:
        return rows.unsqueeze(1)
    size = math.ceil(rows.shape[-1] / pieces)
    return _filled(rows, size * pieces).unflatten(-1, (pieces, size)).transpose(1, 2)


def _filled(matrix: Tensor, columns: int) -> Tensor:
    missing = columns - matrix.shape[-1]
    return functional.pad(matrix, (0, missing)) if missing else matrix


def _added(total: Tensor | None, new: Tensor) -> Tensor:
    return new if total is None else total.add_(new)
