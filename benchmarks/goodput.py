"""What TRANSOM's parts save of a training's time: a model of goodput, its ablation, and processes that are really killed.

Claims: (1) the renewal formula of ``lightning_plugins.engines.resilience.goodput`` gives the stated savings, cadences and
effective shares to the digit that was stated; (2) a Monte-Carlo that draws failures agrees with it; (3) so does a real training
that is killed with SIGKILL at exponential times, within 3 points of effective share.

Of the stated numbers only "28 %" is TRANSOM's own. All others are arithmetic of this project on the save and load times that
TRANSOM published for GPT3-175B (a save to shared storage stalls for 270 s and is taken to load in 178 s; through TRANSOM's
engine 10.6 s and 8.9 s), and are computed here anew like this: MTBF from the failure rates in ``SOURCES``, unrounded; before:
manual recovery R and cadence tau as the column says, stall 270 s, load 178 s; after: 12 min automatic recovery, 30 min cadence,
10.6 s, 8.9 s; saved: 1 - share before / share after. In the ablation R is 2 h and tau 2.5 h; TCE alone brings stall, load and
cadence, TOL+TEE alone the recovery. The last regime (3 min, 2 min, 0.2 s) keeps the load of 8.9 s. The cadences are Young's.
R and tau were chosen; the 28 % appear only near the choice of the ablation, and the table says what others give.

The compressed run divides the seconds of the ablation's first and fourth regime by 60,000 and 30,000; _goodput.py says what a
life is. The share is counted steps x seconds of a step / wall time. Its prediction uses the constants that were measured in the
same repetition: mean seconds of a step and of a standstill, from kill to first step, and of a life. Starting and writing take
milliseconds that do not shrink with the rest, so that these differ from the ablation's, and the row says by how much. The lives
of a repetition are drawn one from each of as many equally likely ranges.

Run: python benchmarks/goodput.py [--budget-s SECONDS]
Writes: benchmarks/results/goodput.csv, docs/pictures/goodput.png.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from _goodput import Outcome, Plan
from _results import write_results

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins.engines.resilience.goodput import (
    Regime,
    best_cadence_s,
    effective_share,
    simulate_share,
    time_saved,
    young_cadence_s,
)
from lightning_plugins.reporting.goodput import Run, draw_effective_share

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "goodput.png"
MIN, HOUR = 60.0, 3600.0
# Hours between failures of the whole job, and the stated savings in percent for (R, tau) of COLUMNS.
SOURCES = {
    "Llama 3, 512 GPUs": (54 * 24 * 16384 / 419 / 512, "99", ("7.5", "5.6", "4.9", "5.8")),
    "Llama 3, 1024": (54 * 24 * 16384 / 419 / 1024, "49.5", ("8.5", "8.0", "7.8", "9.6")),
    "6.5 per 1000 node-days, 1024": (24 * 1000 / 6.5 / 128, "28.8", ("10.0", "11.3", "11.8", "14.6")),
    "OPT-175B-like, 992": (60 * 24 / 105, "13.7", ("13.6", "19.2", "21.3", "26.0")),
    "Ant 0.27 % per card and day, 512": (24 / 0.0027 / 512, "17.4", ("12.2", "16.2", "17.6", "21.7")),
    "Ant 0.27 % per card and day, 1024": (24 / 0.0027 / 1024, "8.7", ("17.4", "26.8", "30.3", "36.2")),
}
COLUMNS = ((1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (3.0, 3.0))
MTBF_H = SOURCES["Ant 0.27 % per card and day, 1024"][0]
BASELINE = Regime(MTBF_H * HOUR, recovery_s=2 * HOUR, load_s=178, cadence_s=2.5 * HOUR, stall_s=270)
BOTH = replace(BASELINE, recovery_s=12 * MIN, load_s=8.9, cadence_s=30 * MIN, stall_s=10.6)
FASTER = "3 min recovery, 2 min cadence, 0.2 s stall"
REGIMES = {
    "baseline": BASELINE,
    "TCE only": replace(BOTH, recovery_s=BASELINE.recovery_s),
    "TOL+TEE only": replace(BASELINE, recovery_s=BOTH.recovery_s),
    "TCE and TOL+TEE": BOTH,
    FASTER: replace(BOTH, recovery_s=3 * MIN, cadence_s=2 * MIN, stall_s=0.2),
}
STATED_SAVED = {"TCE only": "14.0", "TOL+TEE only": "16.8", "TCE and TOL+TEE": "28.5", FASTER: "31.9"}
STATED_SHARE = {"baseline": "67.5", "TCE and TOL+TEE": "94.4", FASTER: "99.0"}
STATED_YOUNG_MIN = {270.0: "68", 10.6: "14", 1.0: "4", 0.2: "1.9"}
FAILURES = 400_000
STEPS_PER_CHECKPOINT = 20
# Times faster, and lives in a repetition: what takes less than a millisecond cannot be slept, and long losses scatter more.
COMPRESSED = {"baseline": (60_000, 24), "TCE and TOL+TEE": (30_000, 12)}
LEAST_REPETITIONS, WITHIN_POINTS = 3, 3.0


def row(table: str, case: str, quantity: str, stated: str, value: float, **others: Any) -> dict[str, Any]:
    """Return a row, with whether the value shows the stated digits."""
    digits = len(stated.partition(".")[2])
    found = {"kind": "model", "table": table, "case": case, "quantity": quantity, "stated": stated, "value": f"{value:.3f}"}
    return found | {"reproduced": f"{value:.{digits}f}" == stated if stated else "", **others}


def drawn_saved(before: Regime, after: Regime, generator: np.random.Generator) -> dict[str, str]:
    """Return the saving by Monte-Carlo in percent, with its standard error."""
    old, new = (simulate_share(regime, FAILURES, generator) for regime in (before, after))
    ratio = old.share / new.share
    error = ratio * math.hypot(old.standard_error / old.share, new.standard_error / new.share)
    return {"monte_carlo": f"{100 * (1 - ratio):.3f}", "monte_carlo_standard_error": f"{100 * error:.3f}"}


def model_rows() -> list[dict[str, Any]]:
    """Return all stated numbers beside those of the formula and of the Monte-Carlo."""
    generator = np.random.default_rng(0)
    rows = []
    for source, (mtbf_h, stated_h, savings) in SOURCES.items():
        rows.append(row("MTBF", source, "h", stated_h, mtbf_h))
        for (recovery_h, cadence_h), stated in zip(COLUMNS, savings, strict=True):
            after = replace(BOTH, mtbf_s=mtbf_h * HOUR)
            before = replace(BASELINE, mtbf_s=mtbf_h * HOUR, recovery_s=recovery_h * HOUR, cadence_s=cadence_h * HOUR)
            case = f"{source}; R {recovery_h:g} h, tau {cadence_h:g} h"
            drawn = drawn_saved(before, after, generator)
            rows.append(row("saved", case, "%", stated, 100 * time_saved(before, after), **drawn))
    for name, regime in REGIMES.items():
        drawn = simulate_share(regime, FAILURES, generator)
        columns = {
            "monte_carlo": f"{100 * drawn.share:.3f}",
            "monte_carlo_standard_error": f"{100 * drawn.standard_error:.3f}",
        }
        share = 100 * effective_share(regime)
        rows.append(row("ablation", name, "effective share, %", STATED_SHARE.get(name, ""), share, **columns))
        if name in STATED_SAVED:
            columns = drawn_saved(BASELINE, regime, generator)
            rows.append(row("ablation", name, "saved, %", STATED_SAVED[name], 100 * time_saved(BASELINE, regime), **columns))
    saved = 100 * time_saved(BASELINE, BOTH)
    rows.append(row("headline", "GPT3-175B, TRANSOM's own figure; R and tau chosen", "saved, %", "28", saved))
    for stall_s, stated in STATED_YOUNG_MIN.items():
        young_min = young_cadence_s(MTBF_H * HOUR, stall_s) / MIN
        rows.append(row("cadence", f"stall {stall_s:g} s, Young", "min", stated, young_min))
        rows.append(row("cadence", f"stall {stall_s:g} s, best", "min", "", best_cadence_s(MTBF_H * HOUR, stall_s) / MIN))
    return rows


def compressed(name: str, seed: int) -> Outcome:
    """Train, kill and restart in a process of its own, and return what was measured."""
    regime, (compression, lives) = REGIMES[name], COMPRESSED[name]
    plan = Plan(
        mtbf_s=regime.mtbf_s / compression,
        recovery_s=regime.recovery_s / compression,
        load_s=regime.load_s / compression,
        step_s=regime.cadence_s / compression / STEPS_PER_CHECKPOINT,
        steps_per_checkpoint=STEPS_PER_CHECKPOINT,
        stall_s=regime.stall_s / compression,
        lives=lives,
        seed=seed,
    )
    script = Path(__file__).with_name("_goodput.py")
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(asdict(plan)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **single},
    )
    return Outcome(**json.loads(answer.stdout))


def measured_and_predicted(outcome: Outcome) -> tuple[float, float]:
    """Return the share that was measured, and the model's with the constants of the same lives, both 0 to 1."""
    cadence_s = STEPS_PER_CHECKPOINT * outcome.step_s
    model = Regime(outcome.mtbf_s, outcome.recovery_and_load_s, 0.0, cadence_s, outcome.stall_s)
    return outcome.counted_steps * outcome.step_s / outcome.wall_s, effective_share(model)


def standard_error(values: list[float]) -> float:
    """Return that of the mean; infinite for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def points(outcomes: list[Outcome]) -> tuple[list[float], list[float]]:
    """Return measured shares and their differences from the model, in points."""
    pairs = [measured_and_predicted(outcome) for outcome in outcomes]
    return [100 * measured for measured, _ in pairs], [100 * (measured - predicted) for measured, predicted in pairs]


def repeat(budget_s: float) -> tuple[dict[str, list[Outcome]], str]:
    """Run all regimes in turn until every standard error is below a point or the budget is spent; say which."""
    began_s = time.monotonic()
    outcomes: dict[str, list[Outcome]] = {name: [] for name in COMPRESSED}
    longest_s = 0.0
    for repetition in range(1, 1000):
        round_began_s = time.monotonic()
        for number, (name, found) in enumerate(outcomes.items()):
            found.append(compressed(name, seed=1000 * number + repetition))
        longest_s = max(longest_s, time.monotonic() - round_began_s)
        errors = [standard_error(values) for found in outcomes.values() for values in points(found)]
        spent_s = time.monotonic() - began_s
        if repetition >= LEAST_REPETITIONS and max(errors) < 1:
            return outcomes, f"standard errors below 1 point after {repetition} repetitions, {spent_s:.0f} s"
        if spent_s + longest_s > budget_s:
            largest = f"largest standard error {max(errors):.2f} points"
            return outcomes, f"budget of {budget_s:g} s spent after {repetition} repetitions, {spent_s:.0f} s; {largest}"
    raise AssertionError("no budget is that large")


def compressed_rows(outcomes: dict[str, list[Outcome]], ended: str) -> tuple[list[dict[str, Any]], dict[str, Run]]:
    """Return a row for each repetition and one for each regime, and what to draw."""
    rows: list[dict[str, Any]] = []
    runs = {}
    for name, found in outcomes.items():
        for outcome in found:
            measured, predicted = (100 * share for share in measured_and_predicted(outcome))
            columns = {key: f"{value:.6g}" for key, value in asdict(outcome).items()}
            shares = {"value": f"{measured:.2f}", "model_with_its_constants": f"{predicted:.2f}"}
            rows.append({"kind": "measured", "table": "compressed run, repetition", "case": name} | shares | columns)
        measured_points, differences = points(found)
        measured, difference = float(np.mean(measured_points)), float(np.mean(differences))
        nominal = 100 * effective_share(REGIMES[name])
        rows.append(
            {
                "kind": "measured",
                "table": "compressed run",
                "case": name,
                "quantity": "effective share, %",
                "value": f"{measured:.2f}",
                "standard_error": f"{standard_error(measured_points):.2f}",
                "model_with_its_constants": f"{measured - difference:.2f}",
                "difference_points": f"{difference:+.2f}",
                "difference_standard_error": f"{standard_error(differences):.2f}",
                "model_uncompressed": f"{nominal:.2f}",
                "within_3_points": abs(difference) <= WITHIN_POINTS,
                "lives": sum(outcome.lives for outcome in found),
                "compression": COMPRESSED[name][0],
                "ended": ended,
            }
        )
        hours = float(np.mean([outcome.mtbf_s for outcome in found])) * COMPRESSED[name][0] / HOUR
        runs[name] = Run(hours, measured / 100, standard_error(measured_points) / 100, (measured - difference) / 100)
    old, new = runs["baseline"], runs["TCE and TOL+TEE"]
    saved = {
        "value": f"{100 * (1 - old.share / new.share):.2f}",
        "model_with_its_constants": f"{100 * (1 - old.model_share / new.model_share):.2f}",
        "model_uncompressed": f"{100 * time_saved(BASELINE, BOTH):.2f}",
    }
    return [*rows, {"kind": "measured", "table": "compressed run", "case": "both", "quantity": "saved, %"} | saved], runs


def draw(runs: dict[str, Run]) -> None:
    """Draw the model's curves, and the compressed runs on them."""
    hours = np.geomspace(1, 500, 200).tolist()
    curves = {
        name: [(each, effective_share(replace(regime, mtbf_s=each * HOUR))) for each in hours] for name, regime in REGIMES.items()
    }
    sources = {source.replace(" per card and day", "").replace(" GPUs", ""): mtbf_h for source, (mtbf_h, *_) in SOURCES.items()}
    title = (
        "Training time that lasts; baseline: 2 h manual recovery, 2.5 h cadence, 270 s stall. Curves are a model; dots are "
        "killed processes, their time compressed, and crosses the model with their constants."
    )
    with atomic_write(PICTURE) as file:
        file.write(draw_effective_share(curves, runs, sources, title))


def main() -> None:
    """Compute, kill, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=120, help="wall time of the compressed runs")
    given = parser.parse_args()
    rows = model_rows()
    for each in rows:
        verdict = {True: "reproduced", False: "NOT REPRODUCED", "": ""}[each["reproduced"]]
        print(f"model {each['table']:9} {each['case']:60} {each['quantity']:19} {each['value']:>8} {each['stated']:>5} {verdict}")
    outcomes, ended = repeat(given.budget_s)
    measured, runs = compressed_rows(outcomes, ended)
    for each in measured:
        print(*(f"{value}" for key, value in each.items() if key != "ended"), sep="  ")
    print(ended)
    draw(runs)
    print("wrote", write_results("goodput", rows + measured), "and", PICTURE.name)


if __name__ == "__main__":
    main()
