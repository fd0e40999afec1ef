"""What failures and checkpoints cost a long training: the share of wall time that becomes training that lasts.

A run takes a checkpoint after every ``tau`` seconds of training and stands still for ``d`` seconds while it does. Failures
come with a mean of ``M`` seconds between them, without memory, and only while the run trains or takes a checkpoint. Each costs
all work since the last finished checkpoint, ``R`` seconds until the run is started again and ``L`` seconds to load. An interval
of training with its checkpoint fails ``e^((tau + d) / M) - 1`` times on average before it succeeds, and so takes

    (M + R + L) * (e^((tau + d) / M) - 1)      seconds of wall time,

of which ``tau`` count. This is Daly's formula with ``1 + (R + L) / M`` in place of ``e^((R + L) / M)``: his failures also strike
while the run recovers, and then the recovery starts again.

Papers: Young, "A first order approximation to the optimum checkpoint interval", CACM 1974; Daly, "A higher order estimate of
the optimum checkpoint interval for restart dumps", FGCS 2006. What TRANSOM's parts save by this formula, and how it agrees with
processes that are really killed, is in ``benchmarks/results/goodput.csv``.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from lightning_plugins._support.errors import InputError

_MEANINGS = {
    "mtbf_s": "the mean seconds of running between two failures of the whole job, math.inf for none",
    "recovery_s": "the seconds from a failure until the run is started again",
    "load_s": "the seconds that reading the checkpoint takes",
    "cadence_s": "the seconds of training between two checkpoints",
    "stall_s": "the seconds that training stands still for a checkpoint",
}
_POSITIVE = ("mtbf_s", "cadence_s")


@dataclass(frozen=True)
class Regime:
    """How often a run fails, and how it protects itself; all in seconds.

    Args:
        mtbf_s: mean time of running between two failures of the whole job, positive; ``math.inf`` for none.
        recovery_s: from a failure until the run is started again, without the load; 0 or more.
        load_s: to read the checkpoint; 0 or more.
        cadence_s: of training between two checkpoints, positive.
        stall_s: that training stands still for a checkpoint; 0 or more.

    Raises:
        InputError: if a value is out of its range.
    """

    mtbf_s: float
    recovery_s: float
    load_s: float
    cadence_s: float
    stall_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))


class Simulated(NamedTuple):
    """A simulated share of time, and how sure it is."""

    share: float
    standard_error: float


def interval_time_s(regime: Regime) -> float:
    """Return the mean seconds of wall time until one interval of training and its checkpoint are done.

    Returns:
        ``(M + R + L) (e^((tau + d) / M) - 1)``; ``math.inf`` where that is too large for a float.
    """
    span_s = regime.cadence_s + regime.stall_s
    if math.isinf(regime.mtbf_s):
        return span_s
    try:
        failures = math.expm1(span_s / regime.mtbf_s)
    except OverflowError:
        return math.inf
    return (regime.mtbf_s + regime.recovery_s + regime.load_s) * failures


def effective_share(regime: Regime) -> float:
    """Return the share of wall time, 0 to 1, that is training which lasts: the cadence over ``interval_time_s``."""
    return regime.cadence_s / interval_time_s(regime)


def time_saved(before: Regime, after: Regime) -> float:
    """Return which share of a training's wall time a change of regime saves; negative if the training gets longer.

    The training itself, in seconds of steps that count, is the same under both.

    Raises:
        InputError: if the run as it was before never finishes an interval.
    """
    share = effective_share(before)
    if share == 0:
        raise InputError(
            f"mtbf_s of {before.mtbf_s:g} and cadence_s of {before.cadence_s:g} never finish an interval before the change; "
            "a shorter cadence_s makes the two comparable"
        )
    after_share = effective_share(after)
    return 1 - share / after_share if after_share else -math.inf


def young_cadence_s(mtbf_s: float, stall_s: float) -> float:
    """Return Young's cadence in seconds, ``sqrt(2 d M)``: near the best while the stall is much shorter than the MTBF.

    Args:
        mtbf_s: mean seconds between failures, positive.
        stall_s: seconds of standstill for a checkpoint, 0 or more.

    Raises:
        InputError: if a value is out of its range.
    """
    _check("mtbf_s", mtbf_s)
    _check("stall_s", stall_s)
    return math.sqrt(2 * stall_s * mtbf_s) if stall_s else 0.0


def best_cadence_s(mtbf_s: float, stall_s: float) -> float:
    """Return the cadence in seconds with the largest ``effective_share``, the root of ``1 - e^(-(tau + d) / M) = tau / M``.

    It depends neither on the recovery nor on the load, and is below ``M``; Young's is its first term for short stalls.

    Args:
        mtbf_s: mean seconds between failures, positive; ``math.inf`` gives ``math.inf``.
        stall_s: seconds of standstill for a checkpoint, 0 or more; 0 gives 0.

    Raises:
        InputError: if a value is out of its range.
    """
    _check("mtbf_s", mtbf_s)
    _check("stall_s", stall_s)
    if stall_s == 0:
        return 0.0
    if math.isinf(mtbf_s):
        return math.inf
    stall = stall_s / mtbf_s
    cadence = 1.0
    # The function is convex and rises, and 1 lies right of its root: Newton's steps go left until rounding stops them.
    while True:
        excess = math.expm1(-cadence - stall)
        following = cadence + (cadence + excess) / excess
        if not 0 < following < cadence:
            return cadence * mtbf_s
        cadence = following


def simulate_share(regime: Regime, failures: int, generator: np.random.Generator) -> Simulated:
    """Draw failures and add up what each life of the run left behind: the effective share without the formula.

    A life trains and takes checkpoints until its failure; the intervals that it finished count, and what came after them is
    lost. A recovery and a load follow.

    Args:
        regime: with a finite ``mtbf_s``.
        failures: how many, at least 2.
        generator: of the failures.

    Returns:
        The share, and its standard error, both 0 to 1.

    Raises:
        InputError: if there are fewer than 2 failures, or the regime knows none.
    """
    if failures < 2:
        raise InputError(f"failures must be at least 2, got {failures}; 100000 give a standard error of about 0.001")
    if math.isinf(regime.mtbf_s):
        raise InputError("mtbf_s must be finite to draw failures, got inf; effective_share takes a run without failures")
    lives_s = generator.exponential(regime.mtbf_s, failures)
    counted_s = regime.cadence_s * np.floor(lives_s / (regime.cadence_s + regime.stall_s))
    wall_s = lives_s + regime.recovery_s + regime.load_s
    share = float(counted_s.sum() / wall_s.sum())
    spread = float(np.std(counted_s - share * wall_s, ddof=1))
    return Simulated(share, spread / (float(wall_s.mean()) * math.sqrt(failures)))


def _check(name: str, value: float) -> None:
    least = "positive" if name in _POSITIVE else "0 or more"
    finite = math.isfinite(value) or (name == "mtbf_s" and value == math.inf)
    if not finite or value < 0 or (value == 0 and name in _POSITIVE):
        end = "" if name == "mtbf_s" else " and finite"
        raise InputError(f"{name} must be {least}{end}, got {value:g}; it is {_MEANINGS[name]}")
