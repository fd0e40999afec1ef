"""A fixed sparse matrix of interpolation weights as a module: ``(sources, C) -> (targets, C)``.

Rows are stored one after another, and so are those of the transposed matrix, so that the values and their gradient alike are
sums over what each place reads: no scattered additions, the same result every time, no buffer made per call but the result.
The matrix follows from the arguments of whoever made it: it is neither saved in checkpoints nor a buffer, which DDP would send
to every process at every step. It still moves with its module.
Cost: one read of C channels per weight, forward and backward. Memory: 32 bytes per weight, for the float64 original and the copy
in the module's own precision.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError

Rows = tuple[Tensor, Tensor, Tensor]
# Offsets, columns and weights of the rows, then those of the transposed matrix.
Tables = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Interpolation(nn.Module):
    """Weighted sums of source rows, in the values' dtype.

    The sums are taken in the precision of the values or of the module, whichever is higher, and in float32 at least. Values of a
    higher precision, or on another device, than the module cost a copy of the tables per call: move the module with ``to``.

    Args:
        row: targets, of any shape.
        column: the source of each entry, of the same shape; a pair may occur several times.
        weight: the weight of each entry, of the same shape.
        shape: ``(targets, sources)``.
    """

    def __init__(self, row: Tensor, column: Tensor, weight: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        used = weight != 0
        entry, place = torch.unique(row[used] * shape[1] + column[used], return_inverse=True)
        total = torch.zeros(len(entry), dtype=torch.float64).index_add_(0, place, weight[used].double())
        row, column = entry // shape[1], entry % shape[1]
        order = column.argsort(stable=True)
        self.shape = shape
        transposed = _stored(column[order], row[order], total[order], shape[1])
        self._exact: Tables = (*_stored(row, column, total, shape[0]), *transposed)
        self._tables = self._copy(self._exact[0].device, torch.get_default_dtype())

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights that are kept ready: float32 or float64."""
        return self._tables[2].dtype

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {len(self._exact[1])} weights"

    def forward(self, values: Tensor) -> Tensor:
        """Return ``(targets, C)`` of values ``(sources, C)``.

        Raises:
            InputError: if the values are not floating point.
        """
        if not values.is_floating_point():
            raise InputError(f"interpolation needs floating point values, got {values.dtype}; convert them with .float()")
        dtype = torch.promote_types(values.dtype, self.dtype)
        ready = dtype == self.dtype and values.device == self._tables[2].device
        tables = self._tables if ready else self._copy(values.device, dtype)
        operand = values.to(dtype).contiguous()
        if torch.is_grad_enabled() and operand.requires_grad:
            return _Sums.apply(operand, *tables).to(values.dtype)
        return _sums(operand, tables[:3]).to(values.dtype)

    def _copy(self, device: torch.device, dtype: torch.dtype) -> Tables:
        dtype = torch.promote_types(dtype, torch.float32)
        a, b, c, d, e, f = (part.to(device=device, dtype=dtype if part.is_floating_point() else None) for part in self._exact)
        return a, b, c, d, e, f

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Interpolation":
        # What .to(), .double(), .cuda() ... call: an empty tensor shows where to, and from there the exact weights are rounded.
        super()._apply(fn, recurse)
        moved = fn(self._tables[2].new_empty(0))
        self._tables = self._copy(moved.device, moved.dtype)
        return self


def _stored(row: Tensor, column: Tensor, weight: Tensor, rows: int) -> Rows:
    ends = torch.bincount(row, minlength=rows).cumsum(0)
    return F.pad(ends, (1, 0)).int(), column.int(), weight


def _sums(values: Tensor, rows: Rows) -> Tensor:
    offsets, columns, weights = rows
    return F.embedding_bag(columns, values, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


class _Sums(torch.autograd.Function):
    """The gradient of embedding_bag itself sorts all indices at every call; the transposed rows are sorted once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, *tables: Tensor) -> Tensor:
        return _sums(values, (tables[0], tables[1], tables[2]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tables = ctx.saved_tensors
        return _Sums.apply(grad.contiguous(), *tables[3:], *tables[:3]), *(None for _ in tables)
