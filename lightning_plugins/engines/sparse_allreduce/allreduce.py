"""``sparse_allreduce``: the sum over ranks of the largest entries, for at most 6 k words of entries from and to each rank.

    acc = residual + gradient                       # on each rank
    update = sparse_allreduce(acc, k) / ranks       # the same bits on every rank
    residual = acc                                  # what was not sent, or not chosen, waits here

Summed over the ranks nothing is lost: sum(acc before) = update * ranks + sum(acc after), exactly where the additions are. Paper:
Li and Hoefler, "Near-Optimal Sparse Allreduce for Distributed Deep Learning", PPoPP 2022, arXiv 2201.07598, algorithms 1 and 2.
"""

from operator import index
from typing import SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.agreement import REFUSED, agree
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.state import SparseAllreduceState
from lightning_plugins.engines.sparse_allreduce.step import Segment, SparseStep
from lightning_plugins.engines.sparse_allreduce.wire import MOST_ELEMENTS


def sparse_allreduce(
    acc: Tensor, k: int, *, state: SparseAllreduceState | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the sum over ranks of the globally largest entries as a dense tensor, and leave the residual in ``acc``.

    **``acc`` is changed in place**: entries that this rank sent and that are in the result become 0, or what the wire's
    rounding left of them; all others stay.

    Args:
        acc: any shape, ``float32`` or ``float64``, contiguous, as many elements on every rank.
        k: entries that a rank sends at most, and that the result has at most; from the number of ranks on.
        state: thresholds, cuts and counters from call to call, of one vector in one group; without one every call computes
            exact thresholds and new cuts.
        group: the ranks; None is the default group, or this process alone where there is none.

    Returns:
        A tensor of ``acc``'s shape, the same bits on every rank, zero outside of the final set.

    Raises:
        InputError: on every rank, if a rank's arguments cannot be used, or ranks differ in size, k, settings or steps.
        FloatingPointError: on every rank, if a rank's ``acc`` or a sum is not finite; no rank's ``acc`` is changed then.
        RuntimeError: of the process group, if a rank is gone: after the group's timeout at the latest.

    Example:
        >>> acc = torch.tensor([3.0, -1.0, 0.5, -4.0])
        >>> sparse_allreduce(acc, 2), acc
        (tensor([ 3.,  0.,  0., -4.]), tensor([ 0.0000, -1.0000,  0.5000,  0.0000]))
    """
    state = SparseAllreduceState(threshold="exact") if state is None else state
    exchange = Exchange(group, acc.device, state.traffic)
    if refusal := why_not(acc, k, exchange.ranks) or state.why_not(acc.numel(), exchange.ranks):
        agree(REFUSED, [0], {"elements": 0, "k": 0, "step": 0, "settings": {}}, exchange, refusal)
    flat = acc.detach().view(-1)
    step = SparseStep(state, flat, min(index(k), len(flat)), exchange)
    finite = bool(flat.sum().isfinite()) or bool(flat.isfinite().all())
    places, values = step.reduce([Segment(0, len(flat), state.routings[0])], finite)
    step.commit()
    if step.report.skipped:
        raise FloatingPointError("acc or a sum of it is not finite; nothing was sent or changed, leave this step out")
    result = torch.zeros_like(flat)
    result[places] = values
    return result.view_as(acc)


def why_not(acc: Tensor, k: int, ranks: int) -> str:
    """Return why these arguments cannot be used, or ``""``."""
    if acc.layout != torch.strided:
        return f"acc must be dense, got {acc.layout}; call .to_dense() on it first"
    if acc.dtype not in (torch.float32, torch.float64):
        return f"acc must be float32 or float64, got {acc.dtype}; keep residuals in float32 and add the gradient to them"
    if not acc.is_contiguous():
        return f"acc must be contiguous, got strides {acc.stride()}; call .contiguous() on it first"
    if not 0 < acc.numel() <= MOST_ELEMENTS:
        return f"acc must have 1 to {MOST_ELEMENTS} elements, got {acc.numel()}; leave empty tensors out, and cut longer ones"
    if not isinstance(k, SupportsIndex) or index(k) < ranks:
        return f"k must be a whole number from the number of ranks, {ranks}, on, got {k}; send more, or use fewer ranks"
    return ""
