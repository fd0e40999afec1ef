"""How many words a rank sends and receives in a step of Ok-Topk, entries and everything beside them, whatever the supports are.

Claim: entries take at most 6 k words from and to each rank, at most 6 k (P - 1) / P where regions have owners that hold the mean
share of them, and what comes on top, amortised over the 64 steps from one partition to the next, is small beside that where k is
ten thousand. Counted in the collectives: of each step the rank with most, then the mean over the steps and the largest of them.
All entries are int32 and float32, two words; thresholds are exact at every 32nd step and follow the count in between.

Supports: `random`; `one_region`, all in a small part of the vector; `disjoint` blocks; `drifting` from step to step; `shifted`,
where every rank selects in the next one's region; the same with the paper's cuts and owners (`cuts="average"`), which has no such
bound. Ranks are real processes over gloo.

Run: python benchmarks/ok_topk_bytes.py [--ranks N ...] [--steps N]
Writes: benchmarks/results/ok_topk_bytes.csv
"""

import argparse
import statistics
from typing import Any

from _ok_topk import real_ranks
from _results import write_results

from tests.engines.sparse_allreduce.cases import PHASES, Case, Moved, measure

SUPPORTS = ("random", "one_region", "disjoint", "drifting", "shifted")
SIZE, DENSITY = 1_000_000, 0.01
SCHEMES: dict[str, dict[str, Any]] = {"ours": {}, "the paper's": {"cuts": "average", "owners": "rank"}}
BESIDE = ("agreement", "counts", "threshold", "cuts")
WORD_BYTES = 4


def row_of(per_rank: list[list[Moved]], k: int) -> dict[str, Any]:
    """Return words over k: of the entries, and of each kind of message beside them."""
    ranks, steps = len(per_rank), list(zip(*per_rank, strict=True))
    row: dict[str, Any] = {}
    for way in ("sent", "received"):
        busiest = [max(moved.words(way) for moved in step) / k for step in steps]
        row |= {f"{way}_mean": f"{statistics.mean(busiest):.3f}", f"{way}_most": f"{max(busiest):.3f}"}
    row |= {"bound": f"{6 * (ranks - 1) / ranks:.2f}", "bound_of_any_owners": "6.00"}
    for phase in BESIDE:
        words = [max(moved.sent.get(phase, 0) for moved in step) / WORD_BYTES for step in steps]
        row[f"{phase}_mean"] = f"{statistics.mean(words) / k:.4f}"
    beside = [max(sum(moved.sent.get(phase, 0) for phase in BESIDE) for moved in step) / WORD_BYTES for step in steps]
    everything = [
        max(sum(moved.sent.get(phase, 0) for phase in (*PHASES, *BESIDE)) for moved in step) / WORD_BYTES for step in steps
    ]
    row |= {
        "beside_words_mean": f"{statistics.mean(beside):.0f}",
        "everything_sent_mean": f"{statistics.mean(everything) / k:.3f}",
    }
    return row


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    k, rows = round(DENSITY * SIZE), []
    with real_ranks() as ranks:
        for count in given.ranks:
            for support in SUPPORTS:
                for scheme, settings in SCHEMES.items():
                    steps = given.steps if scheme == "ours" else min(given.steps, 4)
                    case = Case(support, SIZE, k, steps, settings={"indices": "int32", "values": "exact", **settings})
                    row = row_of(ranks.run(measure, count, case, timeout_s=600), k)
                    rows.append({"ranks": count, "support": support, "scheme": scheme, "k": k, "steps": steps, **row})
                    print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    print("wrote", write_results("ok_topk_bytes", rows))


if __name__ == "__main__":
    main()
