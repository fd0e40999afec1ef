"""Schemes of sparse allreduce as phases of the simulator: who starts how many messages and moves how many words.

The words and messages of the published analysis (Li and Hoefler, PPoPP 2022; a sparse entry is an index and a value, so two
words; k selected of n entries, P ranks) hold for equal sizes and balanced regions:

    dense ring        2n(P-1)/P                                  2(P-1)         (log P algorithms need fewer messages)
    TopkA             2k(P-1)                                    log P
    TopkDSA           4k(P-1)/P .. (2k+n)(P-1)/P                 P + 2 log P
    gTopk             4k log P                                   2 log P
    Gaussian-k        2k'(P-1), k' what the fit selects          log P
    Ok-Topk           2k(P-1)/P .. 6k(P-1)/P                     2P + 2 log P

Here they are counted from index sets instead; Ok-Topk stands in ``simulated_ok_topk.py``. Any number of ranks is allowed: trees
are binomial, and recursive doubling first folds what exceeds a power of two.
"""

from typing import Literal

import numpy as np

from lightning_plugins.engines.sparse_allreduce.simulated_collectives import (
    ACCUMULATE_ELEMENTS,
    ENTRY_ELEMENTS,
    ENTRY_WORDS,
    active,
    allgather,
    region_counts,
    ring,
    scattering,
    split_and_reduce,
    strides,
    union_of,
)
from lightning_plugins.engines.sparse_allreduce.simulator import Indices, Phase, Supports, make_phase

FIT_PASSES = 3  # mean, deviation, comparison


def dense_ring(supports: Supports) -> list[Phase]:
    """Return a dense ring: reduce-scatter, then allgather."""
    return ring(supports.ranks, supports.elements)


def topk_a(supports: Supports) -> list[Phase]:
    """Return an allgather of each rank's exact top-k, which every rank then adds up."""
    gathered = allgather("allgather", ENTRY_WORDS * supports.sizes)
    return [_exact_selection(supports), *gathered, scattering(supports, supports.sizes.sum())]


def gaussian_k(supports: Supports, selected_share: float = 1.0) -> list[Phase]:
    """Return TopkA with the threshold of a fitted normal distribution instead of the exact one.

    Args:
        supports: of the exact top-k.
        selected_share: what the fit selects, over k. Gradients have heavier tails than the fit, late in training far below 1.

    Raises:
        ValueError: if the share is not positive.
    """
    if not selected_share > 0:
        raise ValueError(f"selected_share must be positive, got {selected_share}; 1 is as many as the exact top-k")
    sizes = selected_share * supports.sizes
    passes = (ACCUMULATE_ELEMENTS + FIT_PASSES) * supports.elements
    selection = make_phase("select", supports.ranks, elements=passes)
    return [selection, *allgather("allgather", ENTRY_WORDS * sizes), scattering(supports, sizes.sum())]


def gtopk(supports: Supports) -> list[Phase]:
    """Return a binomial tree that keeps the k largest at every node, then sends the last k down again."""
    ranks, k = supports.ranks, float(supports.sizes.max())
    phases = [_exact_selection(supports)]
    unions = [*supports.local]
    sizes = supports.sizes
    for stride in strides(ranks):
        senders = np.arange(stride, ranks, 2 * stride)
        receivers = senders - stride
        sent, received = np.zeros(ranks), np.zeros(ranks)
        sent[senders] = received[receivers] = ENTRY_WORDS * sizes[senders]
        merged = np.zeros(ranks)
        merged[receivers] = sizes[senders] + sizes[receivers]
        phases.append(make_phase("tree", ranks, active(sent, received), sent, received, ENTRY_ELEMENTS * merged, merged))
        for sender, receiver in zip(senders, receivers, strict=True):
            unions[receiver] = np.union1d(unions[receiver], unions[sender])
            sizes[receiver] = min(k, supports.scale * unions[receiver].size)
    for stride in reversed(strides(ranks)):
        receivers = np.arange(stride, ranks, 2 * stride)
        sent, received = np.zeros(ranks), np.zeros(ranks)
        sent[receivers - stride] = received[receivers] = ENTRY_WORDS * sizes[0]
        phases.append(make_phase("tree", ranks, active(sent, received), sent, received))
    return [*phases, scattering(supports, sizes[0])]


def topk_dsa(supports: Supports, algorithm: Literal["split", "doubling"] = "split") -> list[Phase]:
    """Return SparCML's dynamic sparse allreduce of each rank's exact top-k, which keeps all entries and becomes dense.

    Args:
        supports: of the exact top-k.
        algorithm: ``split`` the vector evenly, reduce and allgather, or recursive ``doubling``; each message is dense as soon as
            that is shorter.
    """
    phases = [_exact_selection(supports)]
    if algorithm == "doubling":
        return [*phases, *_doubling(supports)]
    cuts = np.linspace(0, supports.length, supports.ranks + 1).astype(np.int64)
    phases.append(split_and_reduce(supports, region_counts(supports, cuts)))
    union = union_of(supports.local)
    reduced = supports.scale * np.diff(np.searchsorted(union, cuts))
    words = np.minimum(ENTRY_WORDS * reduced, supports.scale * np.diff(cuts))
    return [*phases, *allgather("allgather", words), scattering(supports, supports.scale * union.size)]


def _doubling(supports: Supports) -> list[Phase]:
    """Return recursive doubling with fill-in: pairs exchange all they have, and have its union afterwards."""
    ranks, scale = supports.ranks, supports.scale

    def words(indices: Indices) -> float:
        return scale * min(ENTRY_WORDS * indices.size, supports.length)

    power = 1 << (ranks.bit_length() - 1)
    held = [*supports.local]
    phases = []
    if ranks > power:
        sent, received = np.zeros(ranks), np.zeros(ranks)
        for extra in range(power, ranks):
            sent[extra] = received[extra - power] = words(held[extra])
            held[extra - power] = np.union1d(held[extra - power], held[extra])
        phases.append(make_phase("exchange", ranks, active(sent, received), sent, received, ENTRY_ELEMENTS / 2 * received))
    for stride in strides(power):
        # After each round all of a group hold the same: one union a group is enough.
        sent, received = np.zeros(ranks), np.zeros(ranks)
        sent[:power] = np.repeat([words(indices) for indices in held[: power // stride]], stride)
        received[:power] = sent[np.arange(power) ^ stride]
        phases.append(make_phase("exchange", ranks, active(sent, received), sent, received, ENTRY_ELEMENTS / 2 * received))
        held = [np.union1d(held[group], held[group + 1]) for group in range(0, power // stride, 2)]
    if ranks > power:
        sent, received = np.zeros(ranks), np.zeros(ranks)
        sent[: ranks - power] = received[power:] = words(held[0])
        phases.append(make_phase("exchange", ranks, active(sent, received), sent, received))
    return [*phases, scattering(supports, scale * held[0].size)]


def _exact_selection(supports: Supports) -> Phase:
    passes = ACCUMULATE_ELEMENTS * supports.elements
    return make_phase("select", supports.ranks, elements=passes, selected=supports.elements)
