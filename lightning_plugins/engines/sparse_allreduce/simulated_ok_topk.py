"""Ok-Topk as phases of the simulator, as published and as we do it, alone or between nodes.

Counted is also what the published analysis leaves out: the exchange of counts, cuts and thresholds, each with the share of the
steps in which it happens. (An implementation may spend a few more collectives of some words on agreeing about counts.)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_plugins.engines.sparse_allreduce.simulated_collectives import (
    ACCUMULATE_ELEMENTS,
    ENTRY_WORDS,
    allgather,
    region_counts,
    ring,
    scattering,
    small_allreduce,
    split_and_reduce,
    union_of,
)
from lightning_plugins.engines.sparse_allreduce.simulator import Counts, Indices, Phase, Supports, make_phase

RADIX_BINS = 256
RADIX_ROUNDS = 4  # of eight bits: a float's 32


@dataclass(frozen=True)
class OkTopk:
    """What can be chosen in Ok-Topk.

    Attributes:
        cuts: ``average`` of each rank's own quantiles, as published, or quantiles of the summed ``histogram`` of indices.
        owners: region r belongs to rank r (``rank``), or to the one that holds most of it (``local``), one to each.
        threshold: ``gather`` all reduced entries to find the global threshold, as published, or sum ``histogram``s of the bits.
        balance_above: largest share of the final entries over the mean from which slices are made equal before they are
            gathered; 0 always, 4 as published.
        threshold_every: steps between exact thresholds.
        repartition_every: steps between new cuts.
        bins: of the histogram of indices.
    """

    cuts: Literal["average", "histogram"] = "histogram"
    owners: Literal["rank", "local"] = "rank"
    threshold: Literal["gather", "histogram"] = "histogram"
    balance_above: float = 0.0
    threshold_every: int = 32
    repartition_every: int = 64
    bins: int = 4096

    def __post_init__(self) -> None:
        for name, valid in (
            ("cuts", ("average", "histogram")),
            ("owners", ("rank", "local")),
            ("threshold", ("gather", "histogram")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)}")
        periods = (self.threshold_every, self.repartition_every, self.bins)
        if min(periods) < 1:
            raise ValueError(f"threshold_every, repartition_every and bins must be 1 or more, got {periods}")


PAPER = OkTopk(cuts="average", threshold="gather", balance_above=4.0)
OURS = OkTopk(cuts="histogram", owners="local", threshold="histogram", balance_above=1.125)


def ok_topk(supports: Supports, options: OkTopk = PAPER) -> list[Phase]:
    """Return Ok-Topk: split and reduce, balance and allgather, and the amortised upkeep of thresholds and cuts."""
    ranks, scale = supports.ranks, supports.scale
    exact, fresh = 1 / options.threshold_every, 1 / options.repartition_every
    passes = (ACCUMULATE_ELEMENTS + 1) * supports.elements
    phases = [
        make_phase("select", ranks, elements=passes),
        make_phase("select", ranks, selected=supports.elements, share=exact),
    ]
    cuts = average_cuts(supports) if options.cuts == "average" else histogram_cuts(supports, options.bins)
    phases += small_allreduce("cuts", ranks, ranks + 1 if options.cuts == "average" else options.bins, fresh)
    counts = region_counts(supports, cuts)
    owner = np.arange(ranks)
    if options.owners == "local":
        owner = local_owners(counts)
        phases += allgather("cuts", np.full(ranks, float(ranks)), share=fresh)
    counts = counts[:, np.argsort(owner)]  # column r is now what rank r owns
    # Sizes go to each owner by a message of their own, as gloo's and NCCL's all-to-all do.
    phases.append(make_phase("counts", ranks, ranks - 1, ranks - 1))
    phases.append(split_and_reduce(supports, counts))

    gathering = options.threshold == "gather"
    if gathering:
        reduced = scale * np.diff(np.searchsorted(union_of(supports.local), cuts))[np.argsort(owner)]
        phases += allgather("threshold", ENTRY_WORDS * reduced, share=exact)
        phases.append(make_phase("threshold", ranks, selected=float(reduced.sum()), share=exact))
    else:
        passes = RADIX_ROUNDS * scale * counts.sum(axis=0)
        phases.append(make_phase("threshold", ranks, elements=passes, share=exact))
        for _ in range(RADIX_ROUNDS):
            phases += small_allreduce("threshold", ranks, RADIX_BINS, exact)

    # Whoever gathered all reduced entries already has the final ones.
    share = 1 - exact if gathering else 1.0
    kept = scale * np.diff(np.searchsorted(supports.final, cuts)).astype(np.float64)
    phases += allgather("counts", np.ones(ranks), share=share)
    if kept.sum() and kept.max() > options.balance_above * kept.mean():
        # The concatenation is in the order of the regions, which the owner of each knows.
        phases.append(_balance(kept, owner, share))
        kept = np.full(ranks, kept.mean())
    phases += allgather("allgather", ENTRY_WORDS * kept[np.argsort(owner)], share=share)
    return [*phases, scattering(supports, float(kept.sum()))]


def two_level(nodes: Supports, node_size: int, options: OkTopk = PAPER) -> list[Phase]:
    """Return dense sums inside nodes with Ok-Topk between them.

    Each rank of a node reduces its share of the vector and exchanges that with its peers on the other nodes: they start their
    messages side by side, share the node's link, and share the node's work.

    Args:
        nodes: what each node selected of its own sum.
        node_size: ranks in a node.
        options: of the exchange between nodes.

    Raises:
        ValueError: if ``node_size`` is below 1.
    """
    if node_size < 1:
        raise ValueError(f"node_size must be 1 or more, got {node_size}")
    within = ring(nodes.ranks, nodes.elements, node_size, inside=True) if node_size > 1 else []
    between = [
        Phase(x.name, x.messages, x.sent_words, x.received_words, x.elements / node_size, x.selected / node_size, x.share)
        for x in ok_topk(nodes, options)
    ]
    return [*within[:1], *between, *within[1:]]


def average_cuts(supports: Supports) -> Indices:
    """Return ``(ranks + 1,)`` cuts: the mean over ranks of the cuts that split each rank's own support into equal counts."""
    inner = np.arange(1, supports.ranks)
    own = [
        indices[indices.size * inner // supports.ranks] if indices.size else supports.length * inner // supports.ranks
        for indices in supports.local
    ]
    return np.concatenate([[0], np.mean(own, axis=0), [supports.length]]).astype(np.int64)


def histogram_cuts(supports: Supports, bins: int) -> Indices:
    """Return ``(ranks + 1,)`` cuts that split the summed histogram of all indices into equal counts.

    Inside of a bin the entries are taken to lie evenly; a region is off its equal share by less than the two bins at its ends.
    """
    edges = np.linspace(0, supports.length, bins + 1)
    below = np.zeros(bins + 1)
    for indices in supports.local:
        below += np.searchsorted(indices, edges)
    if not below[-1]:
        below = edges  # nothing selected: even cuts
    # Empty bins make equal heights, of which the interpolation takes one end: any cut in a gap is as good.
    inner = np.interp(below[-1] * np.arange(1, supports.ranks) / supports.ranks, below, edges)
    return np.concatenate([[0], np.ceil(inner), [supports.length]]).astype(np.int64)


def local_owners(counts: Counts) -> Indices:
    """Return ``(regions,)`` owners: pairs of rank and region by falling count, each rank and region once."""
    ranks = len(counts)
    owner = np.full(ranks, -1)
    free = np.ones(ranks, dtype=bool)
    for pair in np.argsort(-counts, axis=None, kind="stable"):
        rank, region = divmod(int(pair), ranks)
        if free[rank] and owner[region] < 0:
            owner[region] = rank
            free[rank] = False
            if not free.any():
                break
    return owner


def _balance(kept: Counts, owner: Indices, share: float) -> Phase:
    """Return the exchange after which each rank holds an equal slice of the concatenation of all regions' final entries."""
    ranks = len(kept)
    ends = np.cumsum(kept)
    slice_ends = ends[-1] * np.arange(1, ranks + 1) / ranks
    # Entries of region r that lie in slice s: the overlap of two intervals.
    overlap = np.minimum(ends[:, None], slice_ends) - np.maximum((ends - kept)[:, None], slice_ends - ends[-1] / ranks)
    moved = np.zeros((ranks, ranks))
    moved[owner] = np.where(overlap > 1e-9 * ends[-1], overlap, 0)
    # Region r's slice is given to its owner, so that no entry moves where the regions are balanced.
    moved = moved[:, np.argsort(owner)]
    np.fill_diagonal(moved, 0)
    messages = np.maximum((moved > 0).sum(axis=1), (moved > 0).sum(axis=0))
    return make_phase("balance", ranks, messages, ENTRY_WORDS * moved.sum(axis=1), ENTRY_WORDS * moved.sum(axis=0), share=share)
