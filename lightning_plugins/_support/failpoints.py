"""Fail-points: named places in product code where a test can make the process fail, be killed, stall or find the disk full.

    failpoint("memory_checkpoint/commit")

costs one comparison with None until a test arms it, by the variable LIGHTNING_PLUGINS_FAILPOINTS (read once, at import, so
that it reaches processes that the test cannot touch) or inside ``with armed(...)``. A specification is a comma-separated
list of ``name=action`` or ``name=action:count``; the action happens at the count-th hit (the first, unless said otherwise)
and never again. Actions: ``raise``, ``kill`` (SIGKILL to this process), ``exit:CODE``, ``sleep:SECONDS``, ``full`` (ENOSPC).
"""

import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning_plugins._support.errors import InputError, nearest

VARIABLE = "LIGHTNING_PLUGINS_FAILPOINTS"
ACTIONS = {"raise": 0, "kill": 0, "exit": 1, "sleep": 1, "full": 0}  # action -> how many numbers it takes before the count


class FailpointError(RuntimeError):
    """What the action ``raise`` raises."""


class _Armed(NamedTuple):
    action: str
    number: float
    at_hit: int
    hits: Iterator[int]  # 1, 2, ...: counts over all threads without a lock


_armed: dict[str, _Armed] | None = None


def failpoint(name: str) -> None:
    """Do what was armed for ``name``, if anything.

    Raises:
        FailpointError: for the action ``raise``.
        OSError: with ENOSPC, for the action ``full``.
        SystemExit: for the action ``exit``.
    """
    if _armed is not None and name in _armed:
        _hit(name, _armed[name])


@contextmanager
def armed(specification: str) -> Iterator[None]:
    """Arm exactly the given fail-points, with fresh counts, for the length of a ``with`` block.

    Raises:
        InputError: if the specification is not of the form above.
    """
    global _armed
    before = _armed
    _armed = _parse(specification)
    try:
        yield
    finally:
        _armed = before


def _hit(name: str, point: _Armed) -> None:
    if next(point.hits) != point.at_hit:
        return
    if point.action == "raise":
        raise FailpointError(f"fail-point {name} raised")
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if point.action == "exit":
        raise SystemExit(int(point.number))
    if point.action == "sleep":
        time.sleep(point.number)
    if point.action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def _parse(specification: str) -> dict[str, _Armed]:
    points = {}
    for part in filter(None, (part.strip() for part in specification.split(","))):
        name, _, rest = part.partition("=")
        action, *numbers = rest.split(":")
        if action not in ACTIONS:
            raise InputError(f"fail-point {name!r} got the unknown action {action!r}; {nearest(action, ACTIONS)}")
        wanted = ACTIONS[action]
        try:
            number = float(numbers[0]) if wanted else 0.0
            count = int(numbers[wanted]) if len(numbers) > wanted else 1
        except (IndexError, ValueError):
            count = number = 0
        if not name or len(numbers) > wanted + 1 or count < 1 or not 0 <= number < float("inf"):
            form = f"name={action}" + ":NUMBER" * wanted
            raise InputError(f"fail-point {part!r} is not understood; write {form} or {form}:COUNT, with COUNT 1 or more")
        points[name] = _Armed(action, number, count, itertools.count(1))
    return points


if os.environ.get(VARIABLE):
    _armed = _parse(os.environ[VARIABLE])
