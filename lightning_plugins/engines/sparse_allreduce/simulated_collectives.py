"""Collectives as phases of the simulator: messages and words of each rank, for any number of ranks.

Allgathers are Bruck's, rings and split-and-reduce go around once, and a sum of few words doubles recursively. A sparse entry is
an index and a value, so two words.
"""

import numpy as np

from lightning_plugins.engines.sparse_allreduce.simulator import Counts, Indices, Phase, Supports, make_phase

ENTRY_WORDS = 2
ENTRY_ELEMENTS = 8  # an entry that is scattered into the vector touches a memory sector of 32 bytes
ACCUMULATE_ELEMENTS = 3  # residual + gradient: two reads and a write


def ring(ranks: int, elements: float, size: int | None = None, inside: bool = False) -> list[Phase]:
    """Return reduce-scatter and allgather of ``elements`` words around rings of ``size`` members, all ranks if not given.

    Dense chunks differ by a word at most, so the steps of a ring are one phase each.
    """
    size = ranks if size is None else size
    words, messages = elements * (size - 1) / size, size - 1
    return [
        make_phase("reduce_scatter", ranks, messages, words, elements=ACCUMULATE_ELEMENTS * words, inside=inside),
        make_phase("allgather", ranks, messages, words, inside=inside),
    ]


def allgather(name: str, words: Counts, share: float = 1.0) -> list[Phase]:
    """Return Bruck's rounds: with a stride of s, rank p passes the blocks of ranks p, p+1, ... (s of them) on to rank p-s."""
    ranks = len(words)
    below = np.concatenate([[0], np.cumsum(np.tile(words, 2))])
    first = np.arange(ranks)
    phases = []
    for stride in strides(ranks):
        sent = below[first + min(stride, ranks - stride)] - below[first]
        phases.append(make_phase(name, ranks, 1, sent, np.roll(sent, -stride), share=share))
    return phases


def small_allreduce(name: str, ranks: int, words: float, share: float) -> list[Phase]:
    """Return recursive doubling of a short dense vector; ranks beyond a power of two hand theirs in and get the sum back."""
    rounds = len(strides(ranks)) + (0 if ranks & (ranks - 1) == 0 else 1)
    return [make_phase(name, ranks, 1, words, elements=ACCUMULATE_ELEMENTS * words, share=share) for _ in range(rounds)]


def split_and_reduce(supports: Supports, counts: Counts) -> Phase:
    """Return the exchange in which rank p sends to rank r its entries of what r owns; ``counts`` is ``(sender, owner)``."""
    own = np.diag(counts)
    sent, received = counts.sum(axis=1) - own, counts.sum(axis=0) - own
    words = supports.scale * ENTRY_WORDS
    elements = supports.scale * ENTRY_ELEMENTS * counts.sum(axis=0)
    return make_phase("split_and_reduce", supports.ranks, supports.ranks - 1, words * sent, words * received, elements)


def scattering(supports: Supports, entries: float) -> Phase:
    """Return the work of putting as many entries into the dense result."""
    return make_phase("unpack", supports.ranks, elements=ENTRY_ELEMENTS * entries)


def strides(ranks: int) -> list[int]:
    """Return 1, 2, 4, ... below ``ranks``: one a round of a tree or of an allgather."""
    return [1 << round_number for round_number in range((ranks - 1).bit_length())]


def active(sent: Counts, received: Counts) -> Counts:
    """Return one message for each rank that takes part in a round."""
    return np.sign(sent + received)


def region_counts(supports: Supports, cuts: Indices) -> Counts:
    """Return ``(ranks, regions)``: how many of each rank's indices lie in each region, unscaled."""
    return np.array([np.diff(np.searchsorted(indices, cuts)) for indices in supports.local], dtype=np.float64)


def union_of(supports: tuple[Indices, ...]) -> Indices:
    """Return the sorted indices that somebody selected."""
    return np.unique(np.concatenate(supports))
