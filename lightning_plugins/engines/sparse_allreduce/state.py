"""What a sparse allreduce keeps from step to step."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce.exchange import Traffic
from lightning_plugins.engines.sparse_allreduce.reduction import Routing
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from lightning_plugins.engines.sparse_allreduce.threshold import Threshold


@dataclass
class Report:
    """What the last step did.

    Attributes:
        selected: entries that this rank sent or kept for its own region.
        candidates: entries that reached its threshold, before the budget.
        beyond: those of them that reached ``threshold.PROBE`` times as much.
        selected_globally: entries of the result.
        candidates_globally: reduced entries that reached the global threshold, before the budget.
        beyond_globally: those of them that reached ``threshold.PROBE`` times as much.
        most_selected: of any rank.
        most_received: entries that the busiest owner got from others in split-and-reduce.
        exact: whether the thresholds were computed exactly.
        skipped: whether a rank had a gradient that was not finite, or a sum overflowed, so that nothing was done.
    """

    selected: int = 0
    candidates: int = 0
    beyond: int = 0
    selected_globally: int = 0
    candidates_globally: int = 0
    beyond_globally: int = 0
    most_selected: int = 0
    most_received: int = 0
    exact: bool = False
    skipped: bool = False


class SparseAllreduceState:
    """Thresholds, cuts and counters that go from call to call.

    Args:
        threshold: how thresholds are found between exact computations: ``servo``, ``reused``, ``sampled`` or ``exact``.
        threshold_every: steps between two exact computations.
        repartition_every: steps between two cuts into regions.
        cuts: ``histogram`` or ``average``.
        owners: ``local`` or ``rank``.
        indices: ``auto``, ``int32``, ``delta16`` or ``bitmap``.
        values: ``exact`` or ``bfloat16``.

    Raises:
        InputError: for an unknown word, or an interval below 1.

    Attributes:
        traffic: bytes and seconds by phase, since it was last cleared.
        report: what the last step did.
        step: steps so far; skipped ones do not count.
    """

    def __init__(
        self,
        *,
        threshold: str = "servo",
        threshold_every: int = 32,
        repartition_every: int = 64,
        cuts: str = "histogram",
        owners: str = "local",
        indices: str = "auto",
        values: str = "exact",
    ) -> None:
        self.settings = Settings(threshold, threshold_every, repartition_every, cuts, owners, indices, values)
        self.step = 0
        self.local, self.overall = Threshold(), Threshold()
        self.routings = [Routing()]
        self.traffic = Traffic()
        self.report = Report()

    def __repr__(self) -> str:
        return f"SparseAllreduceState({', '.join(f'{name}={value!r}' for name, value in asdict(self.settings).items())})"

    @property
    def due(self) -> bool:
        """Whether the thresholds are computed exactly in the coming step."""
        known = self.local.value is not None and self.overall.value is not None
        return not known or self.settings.threshold == "exact" or self.step % self.settings.threshold_every == 0

    def why_not(self, elements: int, ranks: int) -> str:
        """Return why this state does not fit a vector of so many elements on so many ranks, or ``""``."""
        cuts = self.routings[0].cuts
        if not cuts or (cuts[-1], len(cuts) - 1) == (elements, ranks):
            return ""
        return (
            f"the state is of a vector of {cuts[-1]} elements on {len(cuts) - 1} ranks, acc has {elements} on {ranks}; "
            "make a SparseAllreduceState for each vector and group"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return thresholds, cuts and counters, plain values all."""
        return {
            "step": self.step,
            "local_threshold": asdict(self.local),
            "global_threshold": asdict(self.overall),
            "routings": [asdict(routing) for routing in self.routings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            InputError: if it is not such a state.
        """
        try:
            step = int(state["step"])
            local, overall = Threshold(**state["local_threshold"]), Threshold(**state["global_threshold"])
            first, *others = [Routing(**routing) for routing in state["routings"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no state of a sparse allreduce ({error}); give what state_dict returned") from error
        self.step, self.local, self.overall, self.routings = step, local, overall, [first, *others]
