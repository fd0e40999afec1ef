"""How a sparse allreduce selects, routes and sends: checked together, before anything is sent."""

from dataclasses import dataclass

from lightning_plugins._support.errors import InputError, nearest

THRESHOLDS = ("servo", "reused", "sampled", "exact")
CUTS = ("histogram", "average")
OWNERS = ("local", "rank")
INDICES = ("auto", "int32", "delta16", "bitmap")
VALUES = ("exact", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """What every rank has to have alike.

    Args:
        threshold: how the magnitude from which entries are selected is found between the steps that compute it exactly:
            ``servo`` moves it after each step so that the count stays near k, ``reused`` keeps it, ``sampled`` takes a quantile
            of a sample of each step's vector, ``exact`` computes it at every step.
        threshold_every: steps between two exact computations.
        repartition_every: steps between two cuts of the vector into regions; a step that would load a region's owner with more
            than any rank selects cuts anew by itself.
        cuts: ``histogram`` cuts at quantiles of the summed histogram of all supports, ``average`` averages the quantiles of each
            (the paper's, without a bound on what a rank receives).
        owners: ``local`` gives a region to a rank that selected much of it, ``rank`` gives region r to rank r.
        indices: code of the positions: ``int32``, ``delta16``, ``bitmap``, or ``auto``, the smallest for each message.
        values: ``exact``, or ``bfloat16``, whose rounding errors stay in the residuals.

    Raises:
        InputError: for an unknown word, or an interval below 1.
    """

    threshold: str = "servo"
    threshold_every: int = 32
    repartition_every: int = 64
    cuts: str = "histogram"
    owners: str = "local"
    indices: str = "auto"
    values: str = "exact"

    def __post_init__(self) -> None:
        choices = {"threshold": THRESHOLDS, "cuts": CUTS, "owners": OWNERS, "indices": INDICES, "values": VALUES}
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise InputError(f"there is no {name}={getattr(self, name)!r}; {nearest(str(getattr(self, name)), valid)}")
        for name in ("threshold_every", "repartition_every"):
            every = getattr(self, name)
            if not isinstance(every, int) or every < 1:
                raise InputError(f"{name} must be 1 step or more, got {every}; 1 acts at every step")


def check_density(density: float) -> None:
    """Refuse a share of the gradient that is not in (0, 1]."""
    if not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
        raise InputError(f"density must be in (0, 1], got {density!r}; 0.01 sends 1 % of the gradient")
