"""A threshold from step to step: computed exactly every so often, and followed in between."""

from dataclasses import dataclass

# The count of entries above a threshold falls with a high power of it, the twentieth or so at 1 %: with error feedback they pile
# up right below it. So this share of the count's error, as a power, comes nearer; a sixth swings between everything and nothing.
GAIN = 1.0 / 20.0
FASTEST = 2.0  # a step never moves a threshold further: the count may come from one strange batch
AIM = 0.95  # of the budget, which is never passed: what is above it waits in the residual


@dataclass
class Threshold:
    """A magnitude, or None before the first exact computation.

    Attributes:
        value: what is selected has at least this magnitude.
    """

    value: float | None = None

    def follow(self, count: int, budget: int) -> None:
        """Move towards the threshold that ``AIM * budget`` entries would have reached, after ``count`` have."""
        if self.value is None or budget <= 0:
            return
        factor = (max(count, 1) / (AIM * budget)) ** GAIN
        self.value *= min(max(factor, 1.0 / FASTEST), FASTEST)
