"""The recipe ok_topk_compare as a user runs it: how long it takes, and where everybody ends.

    python benchmarks/ok_topk_recipe.py [options of the recipe]

Writes ``results/ok_topk_recipe.csv``: the rows of ``evaluation.csv`` with the seconds from start to end, imports included. Bytes
of Ok-Topk are counted; those of dense training and PowerSGD follow from the sizes of what they reduce.
"""

import csv
import sys

from _recipes import run_recipe
from _results import write_results


def main(options: list[str]) -> None:
    """Run the recipe; print and write where everybody ended."""
    seconds, run = run_recipe("ok_topk_compare", options)
    with (run / "evaluation.csv").open(newline="") as file:
        rows = [{**row, "whole_run_s": seconds} for row in csv.DictReader(file)]
    for row in rows:
        print(row)
    print(write_results("ok_topk_recipe", rows))
    print(run)


if __name__ == "__main__":
    main(sys.argv[1:])
