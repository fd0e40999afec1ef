"""What a SIGKILL loses: MemoryCheckpoint and VerifiedCheckpointIO against what Lightning and torch have, in one harness.

A real training (one process, CPU, a state of 48 MB: parameters and momentum) saves every ten steps, of 40 ms, in each method's
own way. It is killed from outside, half of the times at a moment drawn from the clock, uniform over a second that begins when the
second save is due and a first is complete; the other half inside of a save: when a drawn number of bytes, uniform over those that
a save writes, has appeared in files of the checkpoint folder or of the system's temporary folder, whose sizes are watched. A slot
of MemoryCheckpoint is no file; there a drawn number in its memory is watched, until it changes. Nothing in the training helps to
aim.

Then a new start loads as a user would: ``fit(ckpt_path=...)`` with ``last`` where it is saved, else the newest by name, and when
that raises, the one before; ``dcp.load`` of the newest folder by name, likewise; MemoryCheckpoint chooses by itself. What has
been loaded is judged by the numbers in every tensor, which tell their step (_memory_checkpoint_kills.py).

    torn         the newest by name raised
    mixed        what was loaded has tensors of several steps
    nothing      no save of the trial could be loaded; and of these, kills by the clock
    steps lost   steps that were done at the kill, less the step that was loaded; all of them if nothing was
    left over    bytes in files that belong to nothing that loads

Lightning writes to the system's temporary folder and moves the file: "/tmp elsewhere" has that folder on another file system than
the checkpoints (in memory, as on many machines), and there a move is a copy. ``AsyncCheckpointIO`` stands with ModelCheckpoint's
defaults, which keep the newest file alone, and with ``save_last=True``. "memory lost too" is MemoryCheckpoint's disk tier alone:
the keeper of the memory and the writer are killed together with the training. A folder of DCP without ``.metadata`` is "torn"
here although its name is all that it shares with a checkpoint: a user who looks for that file steps over it.

SIGKILL ends processes, not machines: what they have handed to the kernel stays. A loss of power would be harder on those that do
not flush their files, Lightning's own among them; that is not measured.

Run: python benchmarks/memory_checkpoint_kills.py [--trials N] [--state-mb MB] [--methods NAME ...] [--seed S] [--tiny]
Writes: benchmarks/results/memory_checkpoint_kills.csv.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import multiprocessing
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _keepers import end_keepers, keepers, kill, wait_until
from _memory_checkpoint_kills import CADENCE, METHODS, NUMBER, Method, is_saved, start_anew, train, whole_on_disk
from _results import write_results

ROOT = Path(__file__).parents[1]
BY_THE_CLOCK, IN_A_SAVE = "by the clock", "in a save"
CLOCK_S = 1.0  # a kill by the clock falls into it
READY_WITHIN_S, AIM_WITHIN_S = 60.0, 5.0
fork = multiprocessing.get_context("fork")  # no thread runs here; starting Python and Lightning anew takes seconds


class Trial:
    """One training, its kill, and the new start after it.

    Args:
        name: of the method.
        state_mb: of the state, in 10^6 bytes.
        root: folder for all of it, on the disk.
        elsewhere: folder on another file system.
    """

    def __init__(self, name: str, state_mb: float, root: Path, elsewhere: Path) -> None:
        self.name, self.state_mb, self.root = name, state_mb, root
        self.method: Method = METHODS[name]
        self.folder, self.runtime, self.progress, self.log = (root / part for part in ("saves", "runtime", "progress", "log"))
        self.temporary = elsewhere if self.method.temporary_elsewhere else root / "tmp"
        for folder in (self.folder, self.runtime, self.temporary):
            folder.mkdir(mode=0o700, exist_ok=True)
        self.progress.write_bytes(NUMBER.pack(0))

    def done(self) -> int:
        """Return the steps that are done."""
        return int(NUMBER.unpack(self.progress.read_bytes())[0])

    def run(self, aimed: bool, generator: random.Random) -> dict[str, Any]:
        """Train, kill, start anew, and return what came of it."""
        arguments = (self.name, self.state_mb, self.folder, self.progress, self.temporary, self.log)
        process = fork.Process(target=train, args=arguments, daemon=True)
        process.start()
        try:
            in_memory = self.method.candidates(self.folder) is None and not self.method.memory_lost
            self.wait(process, lambda: self.done() >= 2 * CADENCE and (in_memory or is_saved(self.folder)), READY_WITHIN_S)
            if not aimed:
                time.sleep(generator.uniform(0, CLOCK_S))
            elif in_memory:
                self.wait_for_memory(generator)
            else:
                self.wait_for_bytes(generator.uniform(0, 1e6 * self.state_mb * self.method.copies))
            others = keepers(self.runtime) if self.method.memory_lost else []
            kill([process.pid, *others])
            process.join()
            wait_until(lambda: not set(others) & set(keepers(self.runtime)))
            if process.exitcode != -signal.SIGKILL:
                raise RuntimeError(f"the training with {self.name} ended by itself:\n{self.log.read_text()[-3000:]}")
            return {"method": self.name, "kill": IN_A_SAVE if aimed else BY_THE_CLOCK, **self.found()}
        finally:
            process.kill()
            process.join()
            end_keepers(self.runtime)

    def wait(self, process: Any, is_so: Callable[[], bool], within_s: float) -> None:
        """Wait for something that the training does."""
        deadline = time.monotonic() + within_s
        while not is_so():
            if not process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the training with {self.name} does not save:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.002)

    def wait_for_bytes(self, count: float) -> None:
        """Return when so many bytes have been added to files, or after some seconds."""
        sizes = self.sizes()
        deadline = time.monotonic() + AIM_WITHIN_S
        while count > 0 and time.monotonic() < deadline:
            before, sizes = sizes, self.sizes()
            for file, size in sizes.items():
                grown = size - before.get(file, 0)
                count -= grown if grown >= 0 else size  # cut off, and written anew

    def sizes(self) -> dict[tuple[int, int], int]:
        """Return the sizes of all files of the saves, by device and number: a file keeps its own when it is renamed."""
        found = {}
        for folder in (self.folder, self.temporary):
            for root, _, names in os.walk(folder):
                for name in names:
                    with suppress(FileNotFoundError):
                        status = os.stat(os.path.join(root, name))
                        found[status.st_dev, status.st_ino] = status.st_size
        return found

    def wait_for_memory(self, generator: random.Random) -> None:
        """Return when a drawn number in one of the keeper's blocks changes, or after some seconds."""
        (keeper,) = keepers(self.runtime)
        blocks = []
        for path in Path(f"/proc/{keeper}/fd").iterdir():
            with suppress(OSError):
                if "memfd" in os.readlink(path) and path.stat().st_size > 1e6 * self.state_mb / 2:
                    blocks.append(os.open(path, os.O_RDONLY))
        places = [(block, 4 * generator.randrange(os.fstat(block).st_size // 4)) for block in blocks]
        before = [os.pread(block, 4, place) for block, place in places]
        deadline = time.monotonic() + AIM_WITHIN_S
        while before == [os.pread(block, 4, place) for block, place in places] and time.monotonic() < deadline:
            pass
        for block in blocks:
            os.close(block)

    def found(self) -> dict[str, Any]:
        """Return what a new start finds."""
        done, candidates = self.done(), self.method.candidates(self.folder)
        torn, answer, rest = False, None, list(candidates or [])
        there = self.bytes_in(self.folder) + self.bytes_in(self.temporary)
        if candidates is None:
            torn, whole = whole_on_disk(self.folder)
            answer = self.load(None)
            torn = torn or "cannot be used" in self.log.read_text()  # what it says of a step that it steps over
        else:
            while rest and (answer := self.load(rest[0])) is None:
                torn = True
                rest.pop(0)
            whole = sum(self.bytes_in(path) for path in rest)
        return {
            "steps_done": done,
            "loaded_step": answer["step"] if answer else "",
            "steps_lost": done - (answer["step"] if answer else 0),
            "torn": torn,
            "mixed": bool(answer and answer["mixed"]),
            "nothing": answer is None,
            "left_over_mb": f"{1e-6 * (there - whole):.3f}",
        }

    def load(self, path: Path | None) -> dict[str, Any] | None:
        """Start anew and return what it has loaded, or None."""
        answer = self.root / "answer"
        arguments = (self.name, self.state_mb, self.folder, path, answer, self.temporary, self.log)
        process = fork.Process(target=start_anew, args=arguments, daemon=True)
        process.start()
        process.join()
        return json.loads(answer.read_text()) if answer.exists() else None

    @staticmethod
    def bytes_in(path: Path) -> int:
        """Return the bytes of a file, or of all files of a folder."""
        return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


@contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """Make a folder on the disk of the project and one in memory, for the length of a block."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as here, tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if os.stat(here).st_dev == os.stat(elsewhere).st_dev:
            raise SystemExit("the project is on the file system of /dev/shm, and another is needed; put it on a disk")
        yield Path(here), Path(elsewhere)


def measure(names: list[str], trials: int, state_mb: float, seed: int) -> list[dict[str, Any]]:
    """Return a row a trial; methods take turns."""
    rows = []
    generator = random.Random(seed)
    for number in range(trials):
        for name in generator.sample(names, len(names)):
            with folders() as (root, elsewhere):
                os.environ["XDG_RUNTIME_DIR"] = str(root / "runtime")  # a keeper of its own
                rows.append(
                    {"part": "trial", "trial": number, **Trial(name, state_mb, root, elsewhere).run(number % 2 == 1, generator)}
                )
    return rows


def summary(names: list[str], trials: list[dict[str, Any]], state_mb: float) -> list[dict[str, Any]]:
    """Return a row a method."""
    rows = []
    for name in names:
        own = [row for row in trials if row["method"] == name]
        rows.append(
            {
                "part": "method",
                "method": name,
                "state_mb": state_mb,
                "trials": len(own),
                **{what: sum(row[what] for row in own) for what in ("torn", "mixed", "nothing")},
                "nothing_by_the_clock": sum(row["nothing"] for row in own if row["kill"] == BY_THE_CLOCK),
                "steps_lost_median": f"{statistics.median(row['steps_lost'] for row in own):g}",
                "steps_lost_max": max(row["steps_lost"] for row in own),
                "left_over_median_mb": f"{statistics.median(float(row['left_over_mb']) for row in own):.1f}",
                "left_over_max_mb": f"{max(float(row['left_over_mb']) for row in own):.1f}",
                "settings": f"{METHODS[name].settings}; fsspec {metadata.version('fsspec')}",
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = {
        "trials": "trials",
        "torn": "torn",
        "mixed": "mixed",
        "nothing": "nothing",
        "nothing_by_the_clock": "by clock",
        "steps_lost_median": "lost, median",
        "steps_lost_max": "max",
        "left_over_median_mb": "left over MB",
        "left_over_max_mb": "max",
    }
    line = "{:36} {:>6} {:>5} {:>5} {:>7} {:>8} {:>13} {:>4} {:>13} {:>6}"
    print(line.format("", *columns.values()))
    for row in rows:
        print(line.format(row["method"], *(str(row[name]) for name in columns)))


def main() -> None:
    """Kill, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="of each method")
    parser.add_argument("--state-mb", type=float, default=48.0)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="try it out: two kills each of a small state, nothing is written")
    given = parser.parse_args()
    trials, state_mb = (2, 8.0) if given.tiny else (given.trials, given.state_mb)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    rows = measure(given.methods, trials, state_mb, given.seed)
    found = summary(given.methods, rows, state_mb)
    report(found)
    print(f"{len(rows)} kills in {time.perf_counter() - start_s:.0f} s")
    if not given.tiny:
        print("wrote", write_results("memory_checkpoint_kills", [*found, *rows]))


if __name__ == "__main__":
    main()
