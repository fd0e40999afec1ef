"""A fixed sparse matrix of interpolation weights as a module: ``(sources, C) -> (targets, C)``.

Rows are stored one after another, and so are those of the transposed matrix, so that the values and their gradient alike are
sums over what each place reads: no scattered additions, the same result every time, no buffer made per call but the result.
Cost: one read of C channels per weight, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor, Tensor]


class Interpolation(nn.Module):
    """Weighted sums of source rows.

    The tables are buffers that are not saved in checkpoints. Half-precision values are computed in the precision of the tables.

    Args:
        row: targets, of any shape.
        column: the source of each entry, of the same shape; a pair may occur several times.
        weight: the weight of each entry, of the same shape.
        shape: ``(targets, sources)``.
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor
    transposed_offsets: Tensor
    transposed_columns: Tensor
    transposed_weights: Tensor

    def __init__(self, row: Tensor, column: Tensor, weight: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        used = weight != 0
        entry, place = torch.unique(row[used] * shape[1] + column[used], return_inverse=True)
        total = torch.zeros(len(entry), dtype=weight.dtype).index_add_(0, place, weight[used])
        row, column = entry // shape[1], entry % shape[1]
        self._store("", row, column, total, shape[0])
        order = column.argsort(stable=True)
        self._store("transposed_", column[order], row[order], total[order], shape[1])
        self.shape = shape

    def _store(self, prefix: str, row: Tensor, column: Tensor, weight: Tensor, rows: int) -> None:
        ends = torch.bincount(row, minlength=rows).cumsum(0)
        self.register_buffer(prefix + "offsets", F.pad(ends, (1, 0)).int(), persistent=False)
        self.register_buffer(prefix + "columns", column.int(), persistent=False)
        self.register_buffer(prefix + "weights", weight.to(torch.get_default_dtype()), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {len(self.columns)} weights"

    def forward(self, values: Tensor) -> Tensor:
        values = values.to(self.weights.dtype).contiguous()
        rows = (self.offsets, self.columns, self.weights)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return _sums(values, rows)
        return _Sums.apply(values, *rows, self.transposed_offsets, self.transposed_columns, self.transposed_weights)


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
