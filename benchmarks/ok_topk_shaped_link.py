"""Where a step's time goes, what a link of few Mbit/s does to a training, and what the thresholds let through: three pictures.

`selected`: two ranks draw gradients of a million elements with the statistics of a network's and keep residuals from nothing on;
what reaches rank 0's threshold is counted at every step, for the four ways to find thresholds, at 1 %.

`breakdown`: four ranks sum 4.2 million such elements at 1 %; the seconds of each phase, waiting for other ranks included, on the
rank that is slowest in all. Steps with exact thresholds stand apart from those that follow them.

`training`: two ranks train the character transformer of ``ok_topk_convergence.py`` with one rate, which was tuned there for
dense training, over links of 5 Mbit/s. Held-out loss against steps and against seconds, evaluations left out.

Ranks are processes with one thread each on one machine; network namespaces stand for hosts, each link shaped at both ends.

Run (as root): python benchmarks/ok_topk_shaped_link.py [--parts selected breakdown training] [--steps N]
Writes: benchmarks/results/ok_topk_shaped_link.csv (with all parts only), docs/pictures/ok_topk_selected.png,
    ok_topk_breakdown.png, ok_topk_wall_clock.png.
"""

import argparse
from typing import Any

from _ok_topk import ROOT, real_ranks
from _ok_topk_convergence import Job, Outcome, train_all
from _ok_topk_shaped_link import POLICIES, phases, selected
from _results import write_results

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins.reporting.sparse_allreduce import draw_breakdown, draw_selected, draw_training
from tests.ranks.client import Ranks
from tests.ranks.hosts import Hosts, why_not

CLAIM = "ok_topk_shaped_link"
PICTURES = ROOT / "docs" / "pictures"
TASK, RATE, MBIT = "character_transformer", 0.4, 5.0
TRAINED = {"dense": "dense", "PowerSGD rank 2": "PowerSGD", "Ok-Topk, servo": "Ok-Topk"}


def draw(name: str, png: bytes) -> None:
    """Replace a picture."""
    with atomic_write(PICTURES / f"{name}.png") as file:
        file.write(png)


def measure_selected(ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    """Count what reaches each policy's thresholds."""
    curves = {policy: ranks.run(selected, 2, policy, 130, timeout_s=300)[0] for policy in POLICIES}
    draw("ok_topk_selected", draw_selected(curves, "Entries that reach rank 0's threshold, 1 M elements, density 1 %"))
    return [
        {"part": "selected", "run": policy, "step": step, "quantity": "candidates / k", "value": f"{share:.4g}"}
        for policy, points in curves.items()
        for step, share in points
    ]


def measure_breakdown(ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    """Take the seconds of each phase."""
    with Hosts(4) as hosts:
        placed = hosts.place(*range(4))
        per_rank = ranks.run(phases, 4, placed, hosts=placed, timeout_s=300)
    bars = {run: max((of_rank[run] for of_rank in per_rank), key=lambda seconds: sum(seconds.values())) for run in per_rank[0]}
    draw("ok_topk_breakdown", draw_breakdown(bars, "A step with 4.2 M elements on 4 ranks that share 2 cores, density 1 %"))
    return [
        {"part": "breakdown", "run": run, "quantity": f"{phase} ms", "value": f"{1e3 * seconds:.2f}"}
        for run, by_phase in bars.items()
        for phase, seconds in by_phase.items()
    ]


def measure_training(ranks: Ranks, steps: int) -> list[dict[str, Any]]:
    """Train over slow links."""
    jobs = [Job(TASK, method, 0, RATE, steps, evaluations=25) for method in TRAINED]
    with Hosts(2, bandwidth_bytes_per_s=MBIT * 1e6 / 8) as hosts:
        outcomes: list[Outcome] = ranks.run(train_all, 2, jobs, hosts=hosts.place(0, 1), timeout_s=900)[0]
    curves = {
        TRAINED[outcome.job.method]: {
            "step": list(outcome.losses),
            "seconds": [outcome.seconds[step] for step in outcome.losses],
            "loss": list(outcome.losses.values()),
        }
        for outcome in outcomes
    }
    title = f"Held-out loss of a character transformer, two ranks, links of {MBIT:g} Mbit/s, density 1 %"
    draw("ok_topk_wall_clock", draw_training(curves, ["step", "seconds"], title))
    return [
        {"part": "training", "run": name, "step": step, "seconds": f"{s:.2f}", "quantity": "loss", "value": f"{loss:.4g}"}
        for name, curve in curves.items()
        for step, s, loss in zip(curve["step"], curve["seconds"], curve["loss"], strict=True)
    ]


PARTS = {"selected": measure_selected, "breakdown": measure_breakdown, "training": measure_training}


def main() -> None:
    """Measure, draw, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"{reason}; this benchmark needs hosts of its own")
    rows: list[dict[str, Any]] = []
    with real_ranks() as ranks:
        for part in given.parts:
            rows += PARTS[part](ranks, given.steps)
    for row in rows:
        if row["part"] == "breakdown" or row.get("step") in (1, 10, 100, given.steps):
            print("{part:10} {run:45} {quantity:28} {value}".format(**row), row.get("step", ""), row.get("seconds", ""))
    if set(given.parts) == set(PARTS):
        print("wrote", write_results(CLAIM, rows))


if __name__ == "__main__":
    main()
