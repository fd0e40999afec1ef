"""Whether sparse steps are faster here: both kinds are tried and timed in the first steps, with all that belongs to them.

    gain = dense step / (sparse step + (step with exact thresholds - sparse step) / threshold_every)

A step is timed from the end of one backward pass to the end of the next. So forward, backward and whatever else a loop does
count on both sides, and so does what selecting takes from backward where they share processors. The slowest rank's times count.
"""

import logging
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_plugins.engines.sparse_allreduce.hook import OkTopkState

WORTHWHILE = 1.1
DENSE_STEPS = 4  # timed; one more comes before, which makes connections
SPARSE_STEPS = 6  # timed, the first with exact thresholds

log = logging.getLogger(__name__)


class Advice:
    """The times, and what follows of them.

    Attributes:
        sparse: whether to send sparsely; None before that is known.
        gain: time of a dense step over that of a sparse one; 0 before it is known.
        sentence: says so; empty before.
    """

    def __init__(self) -> None:
        self.sparse: bool | None = None
        self.gain = 0.0
        self.sentence = ""
        self._ended_s: float | None = None
        self._dense_s: list[float] = []
        self._reduction_s: list[float] = []
        self._exact_s: list[float] = []
        self._sparse_s: list[float] = []

    @property
    def dense(self) -> bool:
        """Whether the coming step is dense: as one that is timed, or since that is better."""
        return len(self._dense_s) < DENSE_STEPS if self.sparse is None else not self.sparse

    def note(self, state: "OkTopkState", *, dense: bool, exact: bool = False, reduction_s: float = 0.0) -> None:
        """Take the end of a step; decide after the last one that is timed.

        Args:
            state: of the hook.
            dense: whether the step was.
            exact: whether it computed its thresholds.
            reduction_s: of a dense one, for its reduction alone.
        """
        if self.sparse is not None:
            return
        if state.acc.device.type == "cuda":
            torch.cuda.synchronize(state.acc.device)
        before_s, self._ended_s = self._ended_s, time.perf_counter()
        if before_s is None:
            return
        taken_s = self._ended_s - before_s
        if dense:
            self._dense_s.append(taken_s)
            self._reduction_s.append(reduction_s)
        else:
            (self._exact_s if exact else self._sparse_s).append(taken_s)
        if len(self._exact_s) + len(self._sparse_s) >= SPARSE_STEPS:
            self._decide(state)

    def _decide(self, state: "OkTopkState") -> None:
        ordinary_s, exact_s = (statistics.median(each or [0.0]) for each in (self._sparse_s, self._exact_s))
        if not self._sparse_s:
            ordinary_s = exact_s
        sparse_s = ordinary_s + max(0.0, exact_s - ordinary_s) / state.cores[0].settings.threshold_every
        times_s = (statistics.median(self._dense_s), sparse_s, statistics.median(self._reduction_s))
        # In microseconds, since what is compared over the ranks are whole numbers.
        slowest = state.everyone.largest_integers([max(1, round(1e6 * seconds)) for seconds in times_s], "agreement")
        dense_s, sparse_s, reduction_s = (1e-6 * microseconds for microseconds in slowest)
        self.gain = dense_s / sparse_s
        self.sparse = self.gain >= WORTHWHILE
        bandwidth = 2 * state.acc.nbytes * (state.exchange.ranks - 1) / state.exchange.ranks / reduction_s
        self.sentence = (
            f"Ok-Topk: a dense step takes {1e3 * dense_s:.1f} ms, {1e3 * reduction_s:.1f} ms of it to reduce at "
            f"{1e-6 * bandwidth:.0f} MB/s; a sparse one takes {1e3 * sparse_s:.1f} ms, a gain of {self.gain:.2f}x: "
            f"{'going on sparsely' if self.sparse else f'staying dense, since that is below {WORTHWHILE}'}"
        )
        if state.everyone.rank == 0:
            log.info(self.sentence)
