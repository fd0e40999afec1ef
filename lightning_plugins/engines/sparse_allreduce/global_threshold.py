"""The k-th largest magnitude among entries that lie on many ranks, exactly, for a few hundred words.

Positive floating-point numbers are ordered as their bits are. So the threshold is found eight bits at a time, from the top: all
ranks add up a histogram of the next eight bits of those entries whose bits so far agree, and walk it from its largest bin down
to the k-th entry. That is four all-reduces of 256 counts for float32, however many entries there are; the paper gathers them all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce.exchange import Exchange, counting_type
from lightning_plugins.engines.sparse_allreduce.selection import count_reaching
from lightning_plugins.engines.sparse_allreduce.threshold import PROBE

DIGIT_BITS = 8


@dataclass(frozen=True)
class GlobalChoice:
    """Which entries of all ranks are in the final set.

    Attributes:
        kept: ``(c,)``, whether each of this rank's entries is.
        counts: how many of each rank are.
        threshold: the least magnitude among them, or what was asked for.
        candidates: entries that reached the threshold, before the budget cut some off.
        beyond: those of them that reached ``PROBE`` times the threshold.
        labels: what each rank has said of its kept entries beside their number.
    """

    kept: Tensor
    counts: list[int]
    threshold: float
    candidates: int
    beyond: int
    labels: list[list[int]] | None = None


def reached(
    values: Tensor, threshold: float, exchange: Exchange, label: Callable[[Tensor], list[int]] = lambda kept: []
) -> GlobalChoice:
    """Return all entries of at least a magnitude; zeros are never among them.

    Args:
        values: ``(c,)``, this rank's entries.
        threshold: the magnitude.
        exchange: the ranks.
        label: returns what all are told of the kept entries in the same collective, as many integers on every rank.
    """
    kept = (values.abs() >= threshold) & (values != 0)
    rows = exchange.all_gather_integers([int(kept.sum()), count_reaching(values, PROBE * threshold), *label(kept)], "counts")
    counts = [row[0] for row in rows]
    return GlobalChoice(kept, counts, threshold, sum(counts), sum(row[1] for row in rows), [row[2:] for row in rows])


def choose(
    values: Tensor, threshold: float | None, budget: int, order: list[int], exchange: Exchange, *, most: int
) -> GlobalChoice:
    """Choose entries of at least a magnitude, and no more than a budget over all ranks: then the largest.

    Args:
        values: ``(c,)``, this rank's entries; zeros are never chosen.
        threshold: None chooses the ``budget`` largest.
        budget: entries of all ranks together; 0 chooses none.
        order: ranks, in the order in which entries of equal magnitude are taken.
        exchange: the ranks.
        most: entries that all ranks together have at most.
    """
    choice = None if threshold is None else reached(values, threshold, exchange)
    if choice is not None and choice.candidates <= budget:
        return choice
    magnitudes = values.abs() if choice is None else torch.where(choice.kept, values.abs(), 0)
    exact = kth_largest(magnitudes, budget, exchange, most) if budget > 0 else float("inf")
    above, ties = magnitudes > exact, (magnitudes == exact) & (magnitudes > 0)
    row = [int(above.sum()), int(ties.sum()), count_reaching(values, PROBE * exact)]
    rows = exchange.all_gather_integers(row, "counts")
    left = max(0, budget - sum(greater for greater, _, _ in rows))
    counts = [0] * exchange.ranks
    for rank in order:
        greater, equal, _ = rows[rank]
        taken = min(equal, left)
        left -= taken
        counts[rank] = greater + taken
    kept = above
    kept[ties.nonzero().flatten()[: counts[exchange.rank] - rows[exchange.rank][0]]] = True
    if choice is not None:
        return GlobalChoice(kept, counts, exact, choice.candidates, choice.beyond)
    return GlobalChoice(kept, counts, exact, sum(counts), sum(beyond for _, _, beyond in rows))


def kth_largest(magnitudes: Tensor, k: int, exchange: Exchange, most: int) -> float:
    """Return the k-th largest over all ranks, or 0 if fewer than ``k`` are above 0.

    Args:
        magnitudes: ``(c,)``, 0 or more, ``float32`` or ``float64``.
        k: 1 or more.
        exchange: the ranks.
        most: entries that all ranks together have at most.
    """
    width, integers = (31, torch.int32) if magnitudes.dtype == torch.float32 else (63, torch.int64)
    bits = magnitudes.contiguous().view(integers).to(torch.int64)
    bits = bits[bits > 0]
    prefix, left, shift = 0, k, width
    while shift > 0:
        digit = min(DIGIT_BITS, shift)
        shift -= digit
        counts = torch.bincount(bits >> shift & (1 << digit) - 1, minlength=1 << digit)
        counts = exchange.add(counts.to(counting_type(most)), "threshold")
        from_top = counts.to(torch.int64).flip(0).cumsum(0)
        if int(from_top[-1]) < left:
            return 0.0
        place = int((from_top >= left).nonzero()[0])
        if place:
            left -= int(from_top[place - 1])
        chosen = (1 << digit) - 1 - place
        bits = bits[bits >> shift & (1 << digit) - 1 == chosen]
        prefix = prefix << digit | chosen
    return float(torch.tensor([prefix], dtype=torch.int64).to(integers).view(magnitudes.dtype))
