"""Does the simulator's cost model hold on real links: alpha and beta fitted on few ranks, more ranks predicted.

Claim: alpha and beta, fitted to gloo's dense all-reduces of 2 to 6 ranks at one bandwidth, predict those of 8 ranks within a
quarter; and with this beta and the words that the simulator counts on the supports that the ranks really selected, the time
that a link of that bandwidth adds to a step of Ok-Topk, at every number of ranks.

Network namespaces stand for hosts; each link is shaped at both ends by a token bucket, which adds no latency and **lets 64 KiB
pass at once whenever it has been idle**, so at the start of every phase. Of that the model knows nothing, and predicts too long
times where phases are short, as a sparse step's are. The ranks are processes that share the machine's two
cores, so a step of Ok-Topk takes long without any limit as well: that is measured and stands in ``unshaped_ms``; predicted is
what comes on top of it.

Run (as root): python benchmarks/ok_topk_calibration.py [--bandwidths MBIT ...] [--tiny]
Writes: benchmarks/results/ok_topk_calibration.csv
"""

import argparse
from typing import Any

import numpy as np
from _ok_topk import real_ranks
from _ok_topk_calibration import DENSITY, PHASES, Sparse, Timings, measure
from _results import write_results

from lightning_plugins.engines.sparse_allreduce.simulated_ok_topk import OURS, ok_topk
from lightning_plugins.engines.sparse_allreduce.simulator import Calibration, Phase, Supports, calibrate, critical_words
from tests.ranks.hosts import Hosts, why_not

CLAIM = "ok_topk_calibration"
RANKS = (2, 3, 4, 6, 8)
SIZES_BYTES = [1 << 18, 1 << 20, 1 << 22]
LENGTHS = [1 << 21]
GOAL = 0.25  # relative error of a prediction


def phases_of(steps: list[Sparse], elements: int) -> list[Phase]:
    """Return the phases in which entries travel, simulated on what was selected."""
    supports = Supports(elements, tuple(one.chosen for one in steps), steps[0].final)
    return [phase for phase in ok_topk(supports, OURS) if phase.name in PHASES and phase.share == 1.0]


def dense_rows(measured: dict[int, list[Timings]], bandwidth: float) -> tuple[Calibration, list[dict[str, Any]]]:
    """Fit all numbers of ranks but the largest, and predict that."""
    times = [(ranks, size, s) for ranks, found in measured.items() for size, s in found[0].dense_s[bandwidth].items()]
    fitted = calibrate(*(np.array(column) for column in zip(*times, strict=True)))
    predicted = iter(zip(fitted.predicted_s.tolist(), fitted.errors.tolist(), strict=True))
    rows = []
    for ranks, size, seconds in times:
        row = {
            "reduction": "dense",
            "bandwidth_mbit": bandwidth,
            "ranks": ranks,
            "bytes": size,
            "measured_ms": f"{1e3 * seconds:.1f}",
            "alpha_us": f"{1e6 * fitted.link.alpha_s:.1f}",
            "beta_ns_per_word": f"{1e9 * fitted.link.beta_s_per_word:.1f}",
        }
        if ranks == fitted.held_out:
            predicted_s, error = next(predicted)
            row |= {"predicted_ms": f"{1e3 * predicted_s:.1f}", "error": f"{error:+.3f}", "verdict": verdict(error)}
        rows.append(row)
    return fitted, rows


def sparse_row(timings: list[Timings], bandwidth: float, fitted: Calibration, elements: int) -> dict[str, Any]:
    """Predict a step of Ok-Topk: its time without a limit, and the simulated words over the fitted link."""
    steps = [one.sparse[elements] for one in timings]
    words = critical_words(phases_of(steps, elements))
    unshaped_s, measured_s = steps[0].seconds[None], steps[0].seconds[bandwidth]
    predicted_s = unshaped_s + fitted.link.beta_s_per_word * words
    error = predicted_s / measured_s - 1
    return {
        "reduction": "Ok-Topk",
        "bandwidth_mbit": bandwidth,
        "ranks": len(timings),
        "bytes": 4 * elements,
        "measured_ms": f"{1e3 * measured_s:.1f}",
        "unshaped_ms": f"{1e3 * unshaped_s:.1f}",
        "predicted_ms": f"{1e3 * predicted_s:.1f}",
        "error": f"{error:+.3f}",
        "simulated_words": f"{words:.0f}",
        "counted_words": f"{sum(max(one.words[name] for one in steps) for name in PHASES):.0f}",
        "verdict": verdict(error),
    }


def verdict(error: float) -> str:
    """Say whether a prediction is as good as claimed."""
    return "held" if abs(error) <= GOAL else "MISSED"


def main() -> None:
    """Measure, fit, predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[10.0, 50.0])
    parser.add_argument("--tiny", action="store_true", help="try it out: small and short, nothing is written")
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"{reason}; this benchmark needs hosts of its own")
    sizes, lengths = ([1 << 12, 1 << 14], [1 << 16]) if given.tiny else (SIZES_BYTES, LENGTHS)
    measured: dict[int, list[Timings]] = {}
    with real_ranks() as ranks:
        for count in RANKS:
            with Hosts(count) as hosts:
                placed = hosts.place(*range(count))
                plan = (placed, given.bandwidths, sizes, lengths)
                measured[count] = ranks.run(measure, count, *plan, hosts=placed, timeout_s=900)
    rows = []
    for bandwidth in given.bandwidths:
        fitted, of_dense = dense_rows(measured, bandwidth)
        rows += of_dense
        for length in lengths:
            rows += [{**sparse_row(found, bandwidth, fitted, length), "density": DENSITY} for found in measured.values()]
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if not given.tiny:
        print("wrote", write_results(CLAIM, rows))


if __name__ == "__main__":
    main()
