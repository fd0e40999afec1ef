"""What a sparse allreduce has to return, computed from the vectors of all ranks on one process, in numpy.

Nothing here knows of regions, messages or codes: the selection sorts, the sum goes over the sources in their order, and the
final set is sorted again. Only where rounding errors go depends on who owns a position, which is asked of the ranks then.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

GAIN, FASTEST, AIM = 1 / 20, 2.0, 0.95


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
            candidates.append(len(chosen))
            if len(chosen) > budget:
                chosen = largest(acc, budget)
            selections.append(chosen)
            total[chosen] += self.on_the_wire(acc[chosen])
        if exact:
            final = largest(total, budget)
            self.overall = float(np.abs(total[final]).min()) if len(final) == budget else 0.0
            candidates_globally = len(final)
        else:
            final = reaching(total, self.overall)
            candidates_globally = len(final)
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
        if not exact and self.threshold != "reused":
            self.local = [followed(value, count, budget) for value, count in zip(self.local, candidates, strict=True)]
            self.overall = followed(self.overall, candidates_globally, budget)
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


def followed(threshold: float, count: int, budget: int) -> float:
    """Return the threshold of the next step."""
    return threshold * min(max((max(count, 1) / (AIM * budget)) ** GAIN, 1 / FASTEST), FASTEST)


def nearest_bfloat16(values: Floats) -> Floats:
    """Round to 8 bits of mantissa, ties to even, and to the largest bfloat16 what is above it."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    beyond = (rounded & 0x7FFFFFFF) >= 0x7F800000
    rounded = np.where(beyond, rounded & 0x80000000 | 0x7F7F0000, rounded)
    return rounded.astype(np.uint32).view(np.float32).astype(values.dtype)
