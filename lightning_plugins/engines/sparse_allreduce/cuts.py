"""Cuts of a vector into one region for each rank, so that each owner receives alike, whatever the supports look like.

Where the supports of all ranks are laid over each other, the cuts stand at the quantiles of that sum. It is known after a few
all-reduces of histograms: the first over the whole vector, each further one inside of the bins that hold a cut. So with P ranks
that select k entries each, no region gets more than ``k + granularity`` entries, and the granularity, the most entries in a
bin that holds a cut, is at most ``max(P, k / 100)``: 1 % of k, or what lies on one single position.

The paper (Li and Hoefler, "Near-Optimal Sparse Allreduce", PPoPP 2022, arXiv 2201.07598) averages the quantiles of every rank's
own support instead. Where supports are disjoint, one region can then receive up to P k entries.
"""

import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.exchange import Exchange, counting_type

FEWEST_BINS, MOST_BINS = 256, 4096
ENTRIES_PER_BIN = 32  # so that a histogram's words are few beside the entries
FINENESS = 100  # refinement ends where no bin with a cut holds more than k / FINENESS


def histogram_cuts(indices: Tensor, size: int, k: int, exchange: Exchange) -> tuple[list[int], int]:
    """Return ``P + 1`` cuts from 0 to ``size``, the same on every rank, and the granularity in entries.

    Args:
        indices: ``(c,)`` sorted, this rank's support.
        size: length of the vector.
        k: entries that a region should get, and that a rank has at most.
        exchange: the ranks.
    """
    ranks = exchange.ranks
    bins = min(MOST_BINS, max(FEWEST_BINS, 1 << max(0, k // ENTRIES_PER_BIN - 1).bit_length()))
    # Intervals that hold a cut each: [low, low + width), with this many entries of all ranks before them.
    edges = _edges(torch.zeros(1, dtype=torch.int64), torch.tensor([size]), bins)
    counts = _counted(indices, edges, k, exchange)[0]
    total = int(counts.sum())
    targets = torch.tensor([total * cut // ranks for cut in range(1, ranks)], dtype=torch.int64)
    if ranks == 1 or total == 0:
        return [size * cut // ranks for cut in range(ranks)] + [size], 0
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    inside = torch.searchsorted(before, targets, right=True).clamp(1, bins) - 1
    low, high, passed, held = edges[0, inside], edges[0, inside + 1], before[inside], counts[inside]
    finest = max(ranks, k // FINENESS)
    while bool(((held > finest) & (high - low > 1)).any()):
        parts = max(2, bins // (ranks - 1))
        edges = _edges(low, high, parts)
        counts = _counted(indices, edges, k, exchange)
        before = torch.cat([counts.new_zeros(len(counts), 1), counts.cumsum(1)], dim=1) + passed[:, None]
        inside = (torch.searchsorted(before, targets[:, None], right=True).clamp(1, parts) - 1).flatten()
        rows = torch.arange(ranks - 1)
        low, high, passed, held = edges[rows, inside], edges[rows, inside + 1], before[rows, inside], counts[rows, inside]
    # The nearer end of the interval.
    cuts = torch.where(targets - passed > held // 2, high, low)
    return [0, *cuts.cummax(0).values.tolist(), size], int(held.max())


def average_cuts(indices: Tensor, size: int, exchange: Exchange) -> list[int]:
    """Return the mean over the ranks of the quantiles of each one's support, the paper's rule."""
    ranks = exchange.ranks
    if len(indices):
        own = [int(indices[len(indices) * cut // ranks]) for cut in range(1, ranks)]
    else:
        own = [size * cut // ranks for cut in range(1, ranks)]
    total = exchange.add(torch.tensor(own, dtype=torch.int64), "cuts") if own else torch.empty(0, dtype=torch.int64)
    return [0, *(cut // ranks for cut in total.tolist()), size]


def _edges(low: Tensor, high: Tensor, parts: int) -> Tensor:
    """Return the ends of ``parts`` equal bins of each interval, ``(intervals, parts + 1)``."""
    steps = torch.arange(parts + 1, dtype=torch.int64)
    return low[:, None] + (high - low)[:, None] * steps // parts


def _counted(indices: Tensor, edges: Tensor, k: int, exchange: Exchange) -> Tensor:
    """Return how many entries of all ranks, k of each at most, lie in each bin, ``(intervals, parts)``."""
    places = torch.searchsorted(indices, edges.to(indices.device)).cpu()
    return exchange.add(torch.diff(places, dim=1).to(counting_type(k * exchange.ranks)), "cuts").to(torch.int64)
