"""Rows of numbers: merged from the files that Lightning's CSVLogger left, written as CSV, laid out for a page.

A row is a mapping from column to value; rows may have different columns, and a table has the union of them in the order of
first appearance.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_plugins._support.atomic import atomic_write

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell as text; numbers stand to the right."""

    text: str
    is_number: bool


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the union of the rows' columns, in the order of first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def write_table(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, whole or not at all; a missing value is an empty field, a float keeps all its digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())


def merge_metrics(paths: Mapping[str, Sequence[str | Path]], destination: str | Path) -> list[dict[str, str]]:
    """Merge the metrics files of all phases and attempts into one CSV with a row per phase and step.

    CSVLogger writes a row for the training and another for the validation of a step; they become one. A run that was killed
    logs the steps after its last checkpoint again when it is resumed: the later attempt's value stands. A last line without
    its end, which a kill in the middle of writing leaves, is dropped.

    Args:
        paths: phase -> the ``metrics.csv`` of its attempts, oldest first. Files that do not exist are passed over: an
            attempt may have been killed before it logged anything.
        destination: the file to write; its first columns are ``phase``, ``epoch`` and ``step``.

    Returns:
        The rows that were written, steps ascending within each phase.
    """
    merged: list[dict[str, str]] = []
    for phase, attempts in paths.items():
        steps: dict[int, dict[str, str]] = {}
        for attempt in attempts:
            for row in read_metrics(attempt):
                step = int(row["step"])
                steps.setdefault(step, {"phase": phase, "epoch": row.get("epoch", ""), "step": row["step"]}).update(row)
        merged += [steps[step] for step in sorted(steps)]
    write_table(destination, merged)
    return merged


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """Read a CSVLogger file as rows of the values that are there; none if the file does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = ({column: value for column, value in row.items() if column and value} for row in csv.DictReader(lines))
    return [row for row in rows if row.get("step", "").isdecimal()]


def layout(rows: Sequence[Row], digits: int = 4) -> tuple[list[Cell], list[list[Cell]]]:
    """Lay rows out as a head and a body of cells; a column of numbers stands to the right, head included.

    Args:
        rows: the table.
        digits: significant digits of floats.
    """
    columns = columns_of(rows)
    body = [[_cell(row.get(column, ""), digits) for column in columns] for row in rows]
    numeric = [
        any(line[i].is_number for line in body) and all(line[i].is_number or not line[i].text for line in body)
        for i in range(len(columns))
    ]
    return [Cell(column, is_number) for column, is_number in zip(columns, numeric, strict=True)], body


def _cell(value: Any, digits: int) -> Cell:
    if isinstance(value, bool) or value is None:
        return Cell("" if value is None else ("yes" if value else "no"), False)
    if isinstance(value, int):
        return Cell(str(value), True)
    try:
        return Cell(f"{float(value):.{digits}g}", True)
    except (TypeError, ValueError):
        return Cell(str(value), False)
