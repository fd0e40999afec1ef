"""What a sparse allreduce has to return, computed from the vectors of all ranks on one process, in numpy.

Nothing here knows of regions, messages or codes: the selection sorts, the sum goes over the sources in their order, and the
final set is sorted again. Only where rounding errors go depends on who owns a position, which is asked of the ranks then.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

PROBE, AIM = 1.05, 0.92


@dataclass
class Followed:
    """How a threshold has moved: change of log(threshold) for a change of log(count), and from step to step."""

    tail: float = 0.05
    drift: float = 0.0

    def next(self, threshold: float, reaching: Floats, budget: int) -> float:
        """Return the threshold of the next step, from the values that have reached this one."""
        count, beyond = len(reaching), int((np.abs(reaching) >= reaching.dtype.type(PROBE * threshold)).sum())
        if count >= 16:
            slope = math.log(count / beyond) if beyond else math.log(count)
            self.tail = (self.tail + min(0.5, max(0.01, math.log(PROBE) / max(slope, 1e-6)))) / 2
        error = self.tail * math.log(max(count, 1) / (AIM * budget))
        self.drift = float(np.clip(self.drift + np.clip(error, -0.05, 0.05) / 4, -0.1, 0.1))
        return threshold * math.exp(float(np.clip(error, -math.log(2), math.log(2))) + self.drift)


@dataclass
class Oracle:
    """Thresholds and step, and the allreduce over them.

    Args:
        k: entries of a rank, and of the result.
        threshold: ``servo``, ``reused``, ``sampled`` (of a whole vector below 65,536 elements) or ``exact``.
        threshold_every: steps between two exact computations.
        bfloat16: whether values are rounded on their way.
    """

    k: int
    threshold: str = "servo"
    threshold_every: int = 32
    bfloat16: bool = False
    step: int = 0
    local: list[float] = field(default_factory=list)
    overall: float | None = None
    of_ranks: list[Followed] = field(default_factory=list)
    of_all: Followed = field(default_factory=Followed)

    def allreduce(self, accs: list[Floats], owner: NDArray[np.int64] | None = None) -> tuple[Floats, list[Floats]]:
        """Return the sum and the residual of each rank.

        Args:
            accs: ``(n,)`` of each rank.
            owner: ``(n,)``, who owns each position; only asked for with bfloat16.
        """
        budget = min(self.k, len(accs[0]))
        exact = self.threshold == "exact" or self.step % self.threshold_every == 0
        known, self.local = self.local, []
        total = np.zeros_like(accs[0])
        selections, candidates = [], []
        self.of_ranks = self.of_ranks or [Followed() for _ in accs]
        for rank, acc in enumerate(accs):
            if self.threshold == "sampled":
                threshold = float(np.sort(np.abs(acc))[-budget])
                chosen = reaching(acc, threshold)
            elif exact:
                chosen = largest(acc, budget)
                threshold = float(np.abs(acc[chosen]).min(initial=np.inf)) if len(chosen) else 0.0
            else:
                threshold = known[rank]
                chosen = reaching(acc, threshold)
            self.local.append(threshold)
            candidates.append(acc[chosen])
            if len(chosen) > budget:
                chosen = largest(acc, budget)
            selections.append(chosen)
            total[chosen] += self.on_the_wire(acc[chosen])
        if exact:
            final = largest(total, budget)
            self.overall = float(np.abs(total[final]).min()) if len(final) == budget else 0.0
            candidates_globally = total[final]
        else:
            final = reaching(total, self.overall)
            candidates_globally = total[final]
            if len(final) > budget:
                final = largest(total, budget)
        update = np.zeros_like(total)
        update[final] = self.on_the_wire(total[final])
        residuals = []
        for rank, (acc, chosen) in enumerate(zip(accs, selections, strict=True)):
            residual = acc.copy()
            gone = np.intersect1d(chosen, final)
            residual[gone] = acc[gone] - self.on_the_wire(acc[gone])
            if owner is not None:
                mine = final[owner[final] == rank]
                residual[mine] += total[mine] - update[mine]
            residuals.append(residual)
        if self.threshold != "reused":
            movers = zip(self.of_ranks, self.local, candidates, strict=True)
            self.local = [mover.next(value, entries, budget) for mover, value, entries in movers]
            self.overall = self.of_all.next(self.overall, candidates_globally, budget)
        self.step += 1
        return update, residuals

    def on_the_wire(self, values: Floats) -> Floats:
        """Return values as they arrive."""
        return nearest_bfloat16(values) if self.bfloat16 else values


def largest(values: Floats, k: int) -> NDArray[np.int64]:
    """Return the sorted positions of the k largest magnitudes that are not 0; among equals the first come first."""
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))[:k]
    return np.sort(order[values[order] != 0])


def reaching(values: Floats, threshold: float) -> NDArray[np.int64]:
    """Return the positions of at least this magnitude, compared in the values' own precision."""
    return np.flatnonzero((np.abs(values) >= values.dtype.type(threshold)) & (values != 0))


def nearest_bfloat16(values: Floats) -> Floats:
    """Round to 8 bits of mantissa, ties to even, and to the largest bfloat16 what is above it."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    beyond = (rounded & 0x7FFFFFFF) >= 0x7F800000
    rounded = np.where(beyond, rounded & 0x80000000 | 0x7F7F0000, rounded)
    return rounded.astype(np.uint32).view(np.float32).astype(values.dtype)
