"""Whether sparse steps would be faster here: measured in the first, dense ones.

    dense  = measured
    sparse = adding, selecting, packing (measured) + 3 k entries over the measured bandwidth + rounds * measured latency

with as many rounds for each bucket where buckets are exchanged one by one.

The bandwidth is what the dense reduction reached, 2 n (P - 1) / P words in its time; three entries of each k is what the two
phases need at most. All ranks compare the slowest rank's times, so that they agree.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_plugins.engines.sparse_allreduce.selection import sampled_threshold, select
from lightning_plugins.engines.sparse_allreduce.wire import Wire

if TYPE_CHECKING:
    from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState

WORTHWHILE = 1.1
DENSE_STEPS = 4  # the first one makes connections and does not count
ROUNDS = 7  # collectives of a sparse exchange

log = logging.getLogger(__name__)


class Advice:
    """The measurements, and what follows of them.

    Attributes:
        sparse: whether to send sparsely; None before that is known.
        gain: predicted time of a dense reduction over that of a sparse one; 0 before it is known.
        sentence: says so, with the times that it follows from; empty before.
    """

    def __init__(self) -> None:
        self.sparse: bool | None = None
        self.gain = 0.0
        self.sentence = ""
        self._dense_s: list[float] = []

    def note_dense(self, seconds: float, buckets: int, state: "OkTopkState") -> None:
        """Take the time of a dense step of so many buckets, whose gradient is in ``state.acc``; decide after the last one."""
        self._dense_s.append(seconds)
        if len(self._dense_s) < DENSE_STEPS:
            return
        # All ranks have to come to the same answer, those with other chunks of the gradient too.
        exchange, k, everyone = state.exchange, state.k, state.everyone
        latency_s = _fastest(lambda: exchange.largest_integers([0], "agreement"))
        settings = state.cores[0].settings
        wire = Wire(settings.indices, settings.values, state.acc.dtype)

        def pack() -> int:
            chosen = select(state.acc, sampled_threshold(state.acc, k))[:k]
            return len(wire.encode(chosen, wire.rounded(state.acc[chosen]), 0, len(state.acc))[1])

        compute_s, entry_bytes = _fastest(pack), pack() / k
        dense_s = min(self._dense_s[1:])  # what disturbs a measurement makes it longer
        # In microseconds, since what is compared over the ranks are whole numbers.
        times = everyone.largest_integers([round(1e6 * t) for t in (dense_s, latency_s, compute_s)], "agreement")
        dense_s, latency_s, compute_s = (1e-6 * max(t, 1) for t in times)
        share = (exchange.ranks - 1) / exchange.ranks
        bandwidth = 2 * state.acc.nbytes * share / dense_s
        rounds = ROUNDS * (1 if state.options.mode == "global" else buckets)
        sparse_s = compute_s + 3 * k * entry_bytes * share / max(bandwidth, 1.0) + rounds * latency_s
        self.gain = dense_s / sparse_s
        self.sparse = everyone.largest_integers([int(self.gain >= WORTHWHILE)], "agreement")[0] == 1
        self.sentence = (
            f"Ok-Topk: a dense reduction takes {1e3 * dense_s:.1f} ms, at {1e-6 * bandwidth:.0f} MB/s; a sparse one would take "
            f"{1e3 * sparse_s:.1f} ms, a gain of {self.gain:.2f}x: "
            f"{'going sparse' if self.sparse else f'staying dense, since that is below {WORTHWHILE}'}"
        )
        if everyone.rank == 0:
            log.info(self.sentence)


def _fastest(task: Callable[[], object], repeats: int = 5) -> float:
    """Return the seconds of the fastest of some repeats."""
    taken_s = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        task()
        taken_s.append(time.perf_counter() - start_s)
    return min(taken_s)
