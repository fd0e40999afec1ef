"""The recipe level_then_depth as a user runs it: what levelling recovers of the depth error that tilt costs.

    python benchmarks/level_then_depth.py [options of the recipe]

Writes ``results/level_then_depth.csv``: the rows of ``evaluation.csv`` with the seconds from start to end, and the goal.
"""

import csv
import sys

from _recipes import run_recipe
from _results import write_results

GOAL_PERCENT = 80
TILT = "10 to 40 degrees"


def main(options: list[str]) -> None:
    """Run the recipe; print and write its scores."""
    seconds, run = run_recipe("level_then_depth", options)
    with (run / "evaluation.csv").open(newline="") as file:
        rows = [{**row, "whole_run_s": seconds, "goal": "", "verdict": ""} for row in csv.DictReader(file)]
    levelled = next(row for row in rows if (row["tilt"], row["way"]) == (TILT, "levelled"))
    held = float(levelled["recovered_percent"]) >= GOAL_PERCENT
    levelled |= {"goal": f">= {GOAL_PERCENT} % recovered", "verdict": "held" if held else "MISSED"}
    # Photographs are the caller's own; the recorded command is the one that anyone can repeat.
    del sys.argv[1:]
    for row in rows:
        print(row)
    print(write_results("level_then_depth", rows))
    print(run)


if __name__ == "__main__":
    main(sys.argv[1:])
