"""What the processes of ``survive`` have done, step by step: written so that a SIGKILL loses no line, and read again.

A training is a folder with one folder a launch, ``0``, ``1``, ... (several if ``--resume`` went on with it); in that, every
process appends to ``process<rank>.jsonl``, and who kills to ``kills.jsonl``. A line is one write to the kernel, which keeps it
when the process is killed right after. Times are of the machine's monotonic clock, the same in all processes.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

KILLS = "kills.jsonl"


class Step(NamedTuple):
    """A training step of one process.

    Attributes:
        number: optimizer steps until then, its own included.
        loss: on this process's share of the batch.
        samples: numbers of the samples in it.
        seconds: of the clock at its end.
    """

    number: int
    loss: float
    samples: list[int]
    seconds: float


class Kill(NamedTuple):
    """A SIGKILL.

    Attributes:
        launch: number of the launch.
        restart: how often the agent had started the processes again before.
        process: rank of the victim.
        step: the last that it had finished.
        seconds: of the clock.
    """

    launch: int
    restart: int
    process: int
    step: int
    seconds: float


@dataclass
class Attempt:
    """What the processes did between one start and their end.

    Attributes:
        launch: number of the launch.
        restart: how often the agent had started them again before.
        from_step: optimizer steps that were done when they began.
        steps: of each process, by rank.
        ends: what each had in the end, by rank and name, as checksums; empty if it did not come that far.
    """

    launch: int
    restart: int
    from_step: int = 0
    steps: dict[int, list[Step]] = field(default_factory=dict)
    ends: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def longest(self) -> list[Step]:
        """The steps of the process that did most; none if no process finished one."""
        return max(self.steps.values(), key=len, default=[])


class Journal:
    """Lines that are appended to a file, each whole or not at all.

    Args:
        path: of the file; its folder must exist.
        **always: what every line has.
    """

    def __init__(self, path: Path, **always: Any) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._always = always

    def write(self, **entry: Any) -> None:
        """Append a line, with the seconds of the clock unless ``entry`` has them."""
        line = json.dumps({**self._always, "seconds": time.monotonic(), **entry}).encode() + b"\n"
        if os.write(self._descriptor, line) != len(line):
            raise OSError("a journal of the recipe could not be written whole; make room on the disk of the run folder")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Tail:
    """The new lines of a journal that somebody else writes.

    Args:
        path: of the file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_bytes = 0

    def __call__(self) -> list[dict[str, Any]]:
        """Return the lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def process_file(launch: Path, rank: int) -> Path:
    """Return the journal of a process."""
    return launch / f"process{rank}.jsonl"


def new_launch(training: Path) -> Path:
    """Make and return the folder of a training's next launch."""
    path = training / str(len(_launches(training)))
    path.mkdir(parents=True)
    return path


def read_attempts(training: Path) -> list[Attempt]:
    """Return what was attempted in all launches of a training, the first one first."""
    found: dict[tuple[int, int], Attempt] = {}
    for launch in _launches(training):
        for path in sorted(launch.glob("process*.jsonl")):
            rank = int(path.stem.removeprefix("process"))
            for line in Tail(path)():
                key = int(launch.name), line["restart"]
                attempt = found.setdefault(key, Attempt(*key))
                if line["kind"] == "start":
                    attempt.from_step = line["step"]
                elif line["kind"] == "step":
                    step = Step(line["step"], line["loss"], line["samples"], line["seconds"])
                    attempt.steps.setdefault(rank, []).append(step)
                else:
                    attempt.ends[rank] = line["checksums"]
    return [found[key] for key in sorted(found)]


def read_kills(training: Path) -> list[Kill]:
    """Return the kills of all launches of a training, the first one first."""
    lines = [(launch, line) for launch in _launches(training) for line in Tail(launch / KILLS)()]
    return [Kill(int(launch.name), line["restart"], line["process"], line["step"], line["seconds"]) for launch, line in lines]


def that_count(attempts: Iterable[Attempt]) -> dict[int, list[Step]]:
    """Return the steps of each process, by rank, that led to the end: what the next attempt begins after stands."""
    counting: dict[int, list[Step]] = {}
    for attempt in attempts:
        for rank in {*counting, *attempt.steps}:
            stand = [step for step in counting.get(rank, []) if step.number <= attempt.from_step]
            counting[rank] = stand + attempt.steps.get(rank, [])
    return dict(sorted(counting.items()))


def _launches(training: Path) -> list[Path]:
    folders = [path for path in training.glob("*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))
