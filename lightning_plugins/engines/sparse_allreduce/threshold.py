"""A threshold from step to step: computed exactly every so often, and followed in between.

What is followed is the logarithm t of the magnitude that ``AIM * k`` entries reach. It moves by itself: residuals grow until as
much leaves them as comes in, and gradients shrink as training goes on. So each step tells two things. How many entries reached
the threshold, and how many of these reached 1.05 times as much: that is the slope of log(count) over t, by which a wrong count
becomes a distance. And whether the distances have a sign: that is the drift, which is learnt.

    error = tail * log(count / (AIM * k)),    drift += error / 4,    t += error + drift

With error feedback the slope is steep, about 20 at a density of 1 %, for entries pile up right below the threshold.
"""

import math
from dataclasses import dataclass

PROBE = 1.05  # times the threshold: where entries are counted a second time
AIM = 0.92  # of the budget, which is never passed: what is above it waits in the residual
FASTEST = 2.0  # a count never moves a threshold further: it may come from one strange batch
LEARNING = 0.25  # of an error becomes drift
SURPRISE = 0.05  # what one error counts for the drift at most
FASTEST_DRIFT = 0.1
FEWEST = 16  # entries from which their tail is read
STEEPEST, FLATTEST = 0.01, 0.5


@dataclass
class Threshold:
    """A magnitude, or None before the first exact computation.

    Attributes:
        value: what is selected has at least this magnitude.
        tail: change of t for a change of log(count).
        drift: change of t in a step.
    """

    value: float | None = None
    tail: float = 0.05
    drift: float = 0.0

    def follow(self, count: int, beyond: int, budget: int) -> None:
        """Move towards what ``AIM * budget`` entries will reach in the coming step.

        Args:
            count: entries that have reached the threshold.
            beyond: those that have reached ``PROBE`` times the threshold.
            budget: entries that may be sent.
        """
        if self.value is None or budget <= 0:
            return
        if count >= FEWEST:
            seen = math.log(PROBE) / max(math.log(count / max(beyond, 1)), 1e-6)
            self.tail = 0.5 * (self.tail + min(max(seen, STEEPEST), FLATTEST))
        error = self.tail * math.log(max(count, 1) / (AIM * budget))
        self.drift = _within(self.drift + LEARNING * _within(error, SURPRISE), FASTEST_DRIFT)
        self.value *= math.exp(_within(error, math.log(FASTEST)) + self.drift)


def _within(number: float, limit: float) -> float:
    return min(max(number, -limit), limit)
