"""What sparse reductions are worth on links of 10 Mbit/s to 1 Gbit/s: against dense ones, other sparse ones and PowerSGD.

Claim: of 4.2 million float32 gradients on four ranks at a density of 1 %, Ok-Topk's allreduce is at least 15 times as fast as
gloo's dense one where links carry 100 Mbit/s. What that means for training is measured beside it: whole steps of a transformer
of 4.1 million parameters in plain DDP, dense, with torch's fp16 and PowerSGD hooks, and with ours, and where the curves cross.

Network namespaces stand for four hosts; each has a link to a switch, shaped at both ends by a token bucket, without added
latency. The ranks are processes with one thread each, and **share two cores** on the machine that the CSV names: at high
bandwidths all of them wait for processors, not for links, and forward and backward take twice what they would alone. Their
time without any communication stands beside. All contestants step in turn, in an order that is shuffled every round; a step
counts as long as its slowest rank took. ``exact_ms`` is one step that computes thresholds exactly, as every 32nd does;
``amortised_ms`` the mean over 32 steps, one such and 31 of the median ones. Thresholds follow the counts in between (``servo``).
Bytes are what a rank's interface counted, headers included, of the rank with most.

Tuned alike: at 500 Mbit/s two bucket sizes for every hook, for PowerSGD (in one bucket, since gloo's threads may mix up the
collectives of several) whether tensors of one shape are batched; the best stands in ``settings``, all trials in the rows
``tuning``.

Run (as root): python benchmarks/ok_topk_slow_network.py [--bandwidths MBIT ...] [--parts collective training] [--seconds S]
     [--tiny]; --tiny tries it out and writes nothing; one part alone keeps the other's rows in the file.
Writes: benchmarks/results/ok_topk_slow_network.csv, docs/pictures/ok_topk_bandwidth.png.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

from _ok_topk import ROOT, real_ranks
from _ok_topk_network import ALONE, DENSE, DENSITY, THRESHOLD_EVERY, Measured, Plan, Taken, collectives, training
from _results import RESULTS, write_results

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins.reporting.sparse_allreduce import crossovers, draw_step_times
from tests.ranks.hosts import Hosts, why_not

CLAIM = "ok_topk_slow_network"
PICTURE = ROOT / "docs" / "pictures" / "ok_topk_bandwidth.png"
RANKS = 4
BANDWIDTHS_MBIT = (10.0, 50.0, 100.0, 500.0, 1000.0)
GOAL_MBIT, GOAL_RATIO = 100.0, 15.0
PARTS = {"collective": collectives, "training": training}


def rows_of(part: str, per_rank: list[Measured]) -> list[dict[str, Any]]:
    """Return a row per bandwidth and contestant, and one per trial."""
    first, rows = per_rank[0], []
    for bandwidth, by_name in first.taken.items():
        dense_s = amortised_s(by_name[DENSE])
        for name, taken in by_name.items():
            ordinary, exact = [one.seconds for one in taken if not one.exact], [one.seconds for one in taken if one.exact]
            everyone = [
                [(one.sent_bytes, one.received_bytes) for one in of_rank.taken[bandwidth][name] if not one.exact]
                for of_rank in per_rank
            ]
            ratio = dense_s / amortised_s(taken)
            sent, received = (
                1e-3 * max(statistics.mean(one[direction] for one in of_rank) for of_rank in everyone) for direction in (0, 1)
            )
            row = {
                "part": part,
                "bandwidth_mbit": "unshaped" if bandwidth is None else bandwidth,
                "contestant": name,
                "ordinary_ms": f"{1e3 * statistics.median(ordinary):.1f}",
                "exact_ms": f"{1e3 * statistics.mean(exact):.1f}" if exact else None,
                "amortised_ms": f"{1e3 * amortised_s(taken):.1f}",
                "times_faster_than_dense": f"{ratio:.2f}",
                "sent_kb": f"{sent:.1f}",
                "received_kb": f"{received:.1f}",
                "steps": len(taken),
                "settings": first.settings.get(name),
                "elements": first.parameters,
                "density": DENSITY if "Topk" in name or "Gaussian" in name else None,
                "ranks": RANKS,
            }
            if part == "collective" and bandwidth == GOAL_MBIT and name.startswith("Ok-Topk"):
                row |= {"goal": f">= {GOAL_RATIO:g}x", "verdict": "held" if ratio >= GOAL_RATIO else "MISSED"}
            rows.append(row)
    for name, setting, seconds in first.tuning:
        rows.append({"part": "tuning", "contestant": name, "settings": setting, "ordinary_ms": f"{1e3 * seconds:.1f}"})
    return rows


def amortised_s(taken: list[Taken]) -> float:
    """Return the mean over the steps from one exact one to the next."""
    ordinary_s = statistics.median(one.seconds for one in taken if not one.exact)
    exact = [one.seconds for one in taken if one.exact]
    return ordinary_s + (statistics.mean(exact) - ordinary_s) / THRESHOLD_EVERY if exact else ordinary_s


def curves_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return bits per second and seconds of each contestant's training steps."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] == "training" and row["bandwidth_mbit"] != "unshaped":
            point = (1e6 * float(row["bandwidth_mbit"]), 1e-3 * float(row["amortised_ms"]))
            curves.setdefault(row["contestant"], []).append(point)
    return curves


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table and where the curves cross the dense one."""
    columns = ("part", "bandwidth_mbit", "contestant", "ordinary_ms", "exact_ms", "amortised_ms", "times_faster_than_dense")
    for row in rows:
        shown = [str(row.get(name) or "") for name in (*columns, "sent_kb", "received_kb", "steps", "verdict")]
        print("{:10} {:>8} {:34} {:>9} {:>9} {:>9} {:>7} {:>9} {:>9} {:>3} {}".format(*shown))
    curves = curves_of(rows)
    for name, curve in curves.items():
        if name in (DENSE, ALONE):
            continue
        crossed = [f"{1e-6 * bits:.0f} Mbit/s" for bits, _ in crossovers(curve, curves[DENSE])]
        sides = [s < dense_s for (_, s), (_, dense_s) in zip(curve, curves[DENSE], strict=True)]
        words = "faster everywhere" if all(sides) else "faster nowhere" if not any(sides) else "both"
        print(f"{name}: as fast as dense at {' and '.join(crossed)}" if crossed else f"{name}: {words}")


def kept_rows(parts: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the parts that are not run now, each with the command that made it."""
    path: Path = RESULTS / f"{CLAIM}.csv"
    if not path.exists():
        return []
    running = {*parts, *(["tuning"] if "training" in parts else [])}
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["part"] not in running]


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidths", type=float, nargs="+", default=list(BANDWIDTHS_MBIT))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=2.5, help="that a contestant may spend at one bandwidth")
    parser.add_argument("--tiny", action="store_true", help="try it out: small and short, nothing is written")
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"{reason}; this benchmark needs hosts of its own")
    start_s, rows = time.perf_counter(), []
    with real_ranks() as ranks, Hosts(RANKS) as hosts:
        placed = hosts.place(*range(RANKS))
        for part in given.parts:
            plan = Plan(placed, [*given.bandwidths, None], given.seconds, 32)
            if given.tiny:
                plan = Plan(placed, [100.0, 1000.0], 0.2, 4, 1 << 16, (32, 2, 16, 2))
            measured = ranks.run(PARTS[part], RANKS, plan, hosts=placed, timeout_s=900)
            rows += rows_of(part, measured)
            print(f"{part}: {time.perf_counter() - start_s:.0f} s")
    report(rows)
    if given.tiny:
        return
    rows = [*kept_rows(given.parts), *rows]
    if curves := curves_of(rows):
        title = f"A training step of 4.1 M parameters on {RANKS} ranks that share 2 cores, density {DENSITY:.0%}"
        with atomic_write(PICTURE) as file:
            file.write(draw_step_times(curves, DENSE, title))
    print("wrote", write_results(CLAIM, rows))


if __name__ == "__main__":
    main()
