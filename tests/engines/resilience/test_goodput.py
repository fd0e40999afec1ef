"""Oracles: the renewal equation by quadrature, a walk through time attempt by attempt, closed limits, stated numbers."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.goodput import (
    Regime,
    best_cadence_s,
    effective_share,
    interval_time_s,
    simulate_share,
    time_saved,
    young_cadence_s,
)

HOUR = 3600.0
ANT_1024_S = 86400 / (0.0027 * 1024)
MANUAL = Regime(ANT_1024_S, recovery_s=7200, load_s=178, cadence_s=9000, stall_s=270)
AUTOMATIC = Regime(ANT_1024_S, recovery_s=720, load_s=8.9, cadence_s=1800, stall_s=10.6)
REGIMES = [
    MANUAL,
    AUTOMATIC,
    replace(MANUAL, mtbf_s=1000),
    replace(MANUAL, mtbf_s=1e6, stall_s=0, load_s=0),
    replace(AUTOMATIC, cadence_s=60000),
]


def by_quadrature(regime):
    """Solve E = P(no failure) span + integral of (x + downtime + E) f(x) over the span, for exponential f."""
    span_s = regime.cadence_s + regime.stall_s
    nodes, weights = np.polynomial.legendre.leggauss(200)
    times_s = (nodes + 1) / 2 * span_s
    density = np.exp(-times_s / regime.mtbf_s) / regime.mtbf_s * weights / 2 * span_s
    failing = density.sum()
    wasted_s = (density * (times_s + regime.recovery_s + regime.load_s)).sum()
    return ((1 - failing) * span_s + wasted_s) / (1 - failing)


def by_walking(regime, intervals, seed):
    """Walk until so many intervals are done, in 100 parts, and return the share of time and its standard error."""
    chance, shares = random.Random(seed), []
    for _ in range(100):
        clock_s, trained_s = 0.0, 0.0
        until_failure_s = chance.expovariate(1 / regime.mtbf_s)
        while trained_s < intervals / 100 * regime.cadence_s:
            if until_failure_s > regime.cadence_s + regime.stall_s:
                clock_s += regime.cadence_s + regime.stall_s
                until_failure_s -= regime.cadence_s + regime.stall_s
                trained_s += regime.cadence_s
            else:
                clock_s += until_failure_s + regime.recovery_s + regime.load_s
                until_failure_s = chance.expovariate(1 / regime.mtbf_s)
        shares.append(trained_s / clock_s)
    return float(np.mean(shares)), float(np.std(shares, ddof=1)) / 10


@pytest.mark.parametrize("regime", REGIMES)
def test_the_formula_solves_the_renewal_equation(regime):
    assert interval_time_s(regime) == pytest.approx(by_quadrature(regime), rel=1e-9)
    assert effective_share(regime) == pytest.approx(regime.cadence_s / by_quadrature(regime), rel=1e-9)


@pytest.mark.parametrize("regime", [MANUAL, AUTOMATIC, replace(MANUAL, mtbf_s=10000, load_s=20000)])
def test_formula_and_simulation_agree_with_a_walk_through_time(regime):
    walked, walked_error = by_walking(regime, 100_000, seed=1)
    drawn = simulate_share(regime, 100_000, np.random.default_rng(2))
    assert walked_error < 0.002
    assert drawn.standard_error < 0.002
    assert effective_share(regime) == pytest.approx(walked, abs=4 * walked_error)
    assert drawn.share == pytest.approx(walked, abs=4 * math.hypot(walked_error, drawn.standard_error))
    assert effective_share(regime) == pytest.approx(drawn.share, abs=4 * drawn.standard_error)


def test_the_standard_error_is_that_of_repeated_simulations():
    drawn = [simulate_share(MANUAL, 500, np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean([each.standard_error for each in drawn]) == pytest.approx(np.std([each.share for each in drawn]), rel=0.15)


def test_without_failures_only_the_stall_costs():
    assert effective_share(replace(MANUAL, mtbf_s=math.inf)) == pytest.approx(9000 / 9270, rel=1e-15)
    assert effective_share(replace(MANUAL, mtbf_s=1e15)) == pytest.approx(9000 / 9270, rel=1e-9)


def test_checkpoints_without_end_leave_nothing_or_all_but_the_downtime():
    assert effective_share(replace(MANUAL, cadence_s=1e-6)) < 1e-8
    free = effective_share(replace(MANUAL, cadence_s=1e-6, stall_s=0))
    assert free == pytest.approx(ANT_1024_S / (ANT_1024_S + 7378), rel=1e-9)


def test_a_cadence_far_beyond_the_mtbf_never_ends():
    hopeless = replace(MANUAL, mtbf_s=1)
    assert interval_time_s(hopeless) == math.inf
    assert effective_share(hopeless) == 0
    assert time_saved(MANUAL, hopeless) == -math.inf
    with pytest.raises(InputError, match="never finish an interval before the change; a shorter cadence_s"):
        time_saved(hopeless, MANUAL)


def test_saved_time_is_that_of_the_same_training():
    before_s, after_s = (1e6 / effective_share(regime) for regime in (MANUAL, AUTOMATIC))
    assert time_saved(MANUAL, AUTOMATIC) == pytest.approx((before_s - after_s) / before_s, rel=1e-12)
    assert time_saved(MANUAL, MANUAL) == 0
    assert time_saved(AUTOMATIC, MANUAL) < 0


@pytest.mark.parametrize("stall_s", [0.2, 10.6, 270, 20_000])
def test_no_other_cadence_is_better_than_the_best(stall_s):
    best_s = best_cadence_s(ANT_1024_S, stall_s)
    regime = replace(MANUAL, cadence_s=best_s, stall_s=stall_s)
    grid_s = best_s * np.geomspace(0.1, 10, 2001)
    shares = [effective_share(replace(regime, cadence_s=float(cadence_s))) for cadence_s in grid_s]
    assert grid_s[np.argmax(shares)] == pytest.approx(best_s, rel=2e-3)
    assert effective_share(regime) >= max(shares)
    assert best_s < ANT_1024_S
    elsewhere = replace(regime, recovery_s=0, load_s=0)
    assert effective_share(elsewhere) >= max(effective_share(replace(elsewhere, cadence_s=best_s * f)) for f in (0.99, 1.01))


def test_youngs_cadence_is_the_best_one_for_short_stalls():
    for mtbf_s, ratio in ((1e4, 1e-2), (1e8, 1e-4), (1e12, 1e-6)):
        assert young_cadence_s(mtbf_s, 1) == pytest.approx(best_cadence_s(mtbf_s, 1), rel=ratio)
    assert young_cadence_s(1e4, 0) == best_cadence_s(1e4, 0) == young_cadence_s(math.inf, 0) == 0
    assert young_cadence_s(math.inf, 1) == best_cadence_s(math.inf, 1) == math.inf


STATED = {
    54 * 24 * 16384 / 419 / 512: (7.5, 5.6, 4.9, 5.8),
    54 * 24 * 16384 / 419 / 1024: (8.5, 8.0, 7.8, 9.6),
    24 * 1000 / 6.5 / 128: (10.0, 11.3, 11.8, 14.6),
    60 * 24 / 105: (13.6, 19.2, 21.3, 26.0),
    24 / (0.0027 * 512): (12.2, 16.2, 17.6, 21.7),
    24 / (0.0027 * 1024): (17.4, 26.8, 30.3, 36.2),
}


@pytest.mark.parametrize(("mtbf_h", "percents"), STATED.items())
def test_savings_that_were_stated(mtbf_h, percents):
    after = replace(AUTOMATIC, mtbf_s=mtbf_h * HOUR)
    for (recovery_h, cadence_h), percent in zip(((1, 1), (2, 2), (2, 3), (3, 3)), percents, strict=True):
        before = Regime(mtbf_h * HOUR, recovery_h * HOUR, 178, cadence_h * HOUR, 270)
        assert round(100 * time_saved(before, after), 1) == percent


def test_the_ablation_that_was_stated():
    faster = Regime(ANT_1024_S, 180, 8.9, 120, 0.2)
    cache = replace(AUTOMATIC, recovery_s=7200)
    detector = replace(MANUAL, recovery_s=720)
    assert [round(100 * time_saved(MANUAL, each), 1) for each in (cache, detector, AUTOMATIC, faster)] == [14.0, 16.8, 28.5, 31.9]
    assert [round(100 * effective_share(each), 1) for each in (MANUAL, AUTOMATIC, faster)] == [67.5, 94.4, 99.0]
    minutes = [young_cadence_s(ANT_1024_S, stall_s) / 60 for stall_s in (270, 10.6, 1, 0.2)]
    assert [f"{minutes[0]:.0f}", f"{minutes[1]:.0f}", f"{minutes[2]:.0f}", f"{minutes[3]:.1f}"] == ["68", "14", "4", "1.9"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mtbf_s": 0}, "mtbf_s must be positive, got 0; it is the mean seconds of running between two failures"),
        ({"mtbf_s": math.nan}, "mtbf_s must be positive, got nan"),
        ({"mtbf_s": -math.inf}, "mtbf_s must be positive, got -inf"),
        ({"cadence_s": 0}, "cadence_s must be positive and finite, got 0; it is the seconds of training between two checkpoints"),
        ({"cadence_s": math.inf}, "cadence_s must be positive and finite, got inf"),
        ({"recovery_s": -1}, "recovery_s must be 0 or more and finite, got -1; it is the seconds from a failure"),
        ({"load_s": -0.5}, "load_s must be 0 or more and finite, got -0.5"),
        ({"stall_s": math.inf}, "stall_s must be 0 or more and finite, got inf"),
    ],
)
def test_bad_regimes_are_refused_in_a_sentence(wrong, message):
    with pytest.raises(InputError) as caught:
        replace(MANUAL, **wrong)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_other_bad_input():
    for cadence_s in (young_cadence_s, best_cadence_s):
        with pytest.raises(InputError, match="mtbf_s must be positive, got -1"):
            cadence_s(-1, 1)
        with pytest.raises(InputError, match="stall_s must be 0 or more and finite, got -1"):
            cadence_s(1, -1)
    with pytest.raises(InputError, match="failures must be at least 2, got 1; 100000 give"):
        simulate_share(MANUAL, 1, np.random.default_rng(0))
    with pytest.raises(InputError, match="mtbf_s must be finite to draw failures, got inf; effective_share takes"):
        simulate_share(replace(MANUAL, mtbf_s=math.inf), 10, np.random.default_rng(0))
