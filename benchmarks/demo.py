"""The recipe as `make demo` runs it: how long it takes, and what the student scores beside the trivial predictors.

    python benchmarks/demo.py [options of the recipe]

Writes ``results/demo.csv``: the rows of ``evaluation.csv`` with the seconds from start to end, rendering and imports included.
"""

import csv
import sys

from _recipes import run_recipe
from _results import write_results


def main(options: list[str]) -> None:
    """Run the recipe; print and write its scores."""
    seconds, run = run_recipe("panoramic_depth", options)
    with (run / "evaluation.csv").open(newline="") as file:
        rows = [{**row, "whole_run_s": seconds} for row in csv.DictReader(file)]
    with (run / "metrics.csv").open(newline="") as file:
        gates = [row["panoramic_depth/val_gates_saturated_share"] for row in csv.DictReader(file)]
    rows[0]["gates_saturated_share"] = [gate for gate in gates if gate][-1]
    # Photographs are the caller's own; the recorded command is the one that anyone can repeat.
    del sys.argv[1:]
    for row in rows:
        print(row)
    print(write_results("demo", rows))
    print(run)


if __name__ == "__main__":
    main(sys.argv[1:])
