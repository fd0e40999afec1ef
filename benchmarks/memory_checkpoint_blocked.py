"""For how long a save holds up the training: MemoryCheckpoint against what Lightning and torch have, and against one memcpy.

Claims, for states of 50, 250 and 1000 MB (parameters and the optimizer's moments together): MemoryCheckpoint holds up the
training for at most a thirtieth of ModelCheckpoint's time and at most 1.3 times one memcpy into memory that is there already;
its lazy mode for less than that memcpy.

Each contestant is a real Trainer (one process, CPU, one thread) of its own; they take turns, in an order that is shuffled every
round: a save and the ten steps after it, then the next waits until nothing of the save runs any more and the disk is flushed. All
train the same module: 48 tables with SparseAdam, whose step is cheap since it changes few rows, and a frozen layer applied so
often that forward and backward pass take 0.3 ms for each MB of state, about one and a half times as long as copying it; a dense
model of that size takes longer for a batch of 64 rows. The time that a save blocks is what is spent between two steps and between
backward pass and optimizer, less the same of a step without a save. ``next_10_longer_ms`` is by how much the ten steps after it
are longer than ordinary ones of the same round; work in the background is paid for there. It scatters, by as much as the row of
``memcpy`` shows, which has no background.

Two cores: one trains, one is free for whoever works in the background. The first save of each (two of ours, which make the
memory) is not counted, but stands in ``first_ms``. DCP gets the state of module and optimizer, on CPU with staging options all
False as it must; a second one stages in its thread, joined before the optimizer steps, as our lazy mode does. ModelCheckpoint
deletes the file before, DCP does not. Nobody but DCP flushes its files. ``trainer_extra_mb`` is the peak of the process less
what it had before it trained; for ours, without the disk tier (a process of its own, seldom), most of it is ``keeper_mb``, the
two slots, which outlive the trainer. The memory for file pages is not in it. ``..._ms`` of parts: medians within our saves, in
the training's thread. ``others_cores``: processors that were busy with something else meanwhile; a turn with more than half of
one is done again, for 20 s a size at most.

Run: python benchmarks/memory_checkpoint_blocked.py [--sizes MB ...] [--rounds N ...] [--tiny]; --tiny tries it out and writes
     nothing.
Writes: benchmarks/results/memory_checkpoint_blocked.csv, docs/pictures/memory_checkpoint_blocked.png.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import logging
import multiprocessing
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _memory_checkpoint import (
    CONTESTANTS,
    EAGER,
    FLOOR,
    LAZY,
    STOCK,
    Ended,
    Tables,
    Turn,
    compete,
    median_parts,
)
from _results import write_results

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins.engines.resilience.host_memory import available_bytes
from lightning_plugins.reporting.memory_checkpoint import Blocked, draw_blocked_times

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "memory_checkpoint_blocked.png"
ROUNDS = {50: 30, 250: 4, 1000: 2}
WARM_UP = {EAGER: 2, LAZY: 2}
STOCK_RATIO, FLOOR_RATIO = 30.0, 1.3
COPIES_AT_ONCE = 14  # of the state: shared by all, four slots, the floor's target, those of the one whose turn it is; and room
QUIET_CORES, DISTURBED_CORES = 0.3, 0.5
QUIET_AT_MOST_S, QUIET_OF_A_SIZE_S = 3.0, 20.0  # waiting, and doing turns again
PASS_MS_PER_MB = 0.3
JIFFY_S = 1 / os.sysconf("SC_CLK_TCK")


class Others:
    """What processors do for others than this process and its descendants' pids."""

    def __init__(self, pids: list[int]) -> None:
        self.pids = [os.getpid(), *pids]
        self.left_s = QUIET_OF_A_SIZE_S
        self._seen = self._read()

    def _read(self) -> tuple[float, float, float]:
        fields = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        busy = JIFFY_S * (sum(fields[:8]) - fields[3] - fields[4])
        own = 0.0
        for pid in [*self.pids, *keepers(self.pids)]:
            try:
                own += JIFFY_S * sum(
                    int(each) for each in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                )
            except OSError:
                continue
        return time.perf_counter(), busy, own

    def cores(self) -> float:
        """Return the mean since the last call."""
        (start_s, busy, own), self._seen = self._seen, self._read()
        return max(0.0, (self._seen[1] - busy - self._seen[2] + own) / (self._seen[0] - start_s))

    def wait_quiet(self) -> None:
        """Return when others have paused, or after some seconds; the cores are counted anew."""
        start_s = time.monotonic()
        self.cores()
        while time.monotonic() - start_s < min(QUIET_AT_MOST_S, self.left_s):
            time.sleep(0.1)
            if self.cores() < QUIET_CORES:
                break
        self.left_s -= time.monotonic() - start_s


def keepers(pids: list[int]) -> list[int]:
    """Return the keeper of this benchmark, which is nobody's child."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            os.environ["XDG_RUNTIME_DIR"].encode() in b"\0".join(words)
            and b"lightning_plugins.engines.resilience.keeper" in words
        ):
            found.append(int(path.parent.name))
    return found


@contextmanager
def contestants(module: Tables, folder: Path) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Start them all, with one state in memory that they share until they change it; end them after the block."""
    fork = multiprocessing.get_context("fork")
    started = {}
    try:
        for number, name in enumerate(CONTESTANTS):
            own_folder = folder / str(number)
            own_folder.mkdir()
            here, there = fork.Pipe()
            inherited = [here, *(pipe for _, pipe in started.values())]
            process = fork.Process(target=compete, args=(name, module, own_folder, there, inherited), daemon=True)
            process.start()
            there.close()
            started[name] = (process, here)
        yield started
    finally:
        for process, here in started.values():
            here.close()
            process.join(20)
            if process.is_alive():
                process.kill()


def undisturbed(pipe: Any, repeats: int, others: Others) -> tuple[Turn, float]:
    """Return a turn and what others did meanwhile; one that others disturbed is done again while there is time."""
    while True:
        others.wait_quiet()
        pipe.send(repeats)
        start_s, turn, cores = time.monotonic(), pipe.recv(), others.cores()
        os.sync()
        if cores < DISTURBED_CORES or others.left_s <= 0:
            return turn, cores
        others.left_s -= time.monotonic() - start_s


def repeats_for(module: Tables, seconds: float) -> int:
    """Return how often the frozen layer is to be applied for a forward and backward pass of this length."""
    hidden = torch.randn(8 * len(module.tables), module.frozen.shape[0])
    taken = []
    for _ in range(20):
        start_s = time.perf_counter()
        with torch.no_grad():
            torch.tanh(hidden @ module.frozen)
        taken.append(time.perf_counter() - start_s)
    return max(1, round(seconds / min(taken)))


def measure(state_mb: float, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    if available_bytes() < 1e6 * state_mb * COPIES_AT_ONCE:
        raise SystemExit(f"{state_mb:g} MB need {1e-3 * state_mb * COPIES_AT_ONCE:.0f} GB of free memory; leave the size out")
    torch.manual_seed(0)
    module = Tables(state_mb)
    repeats = repeats_for(module, 1e-3 * PASS_MS_PER_MB * state_mb)
    turns: dict[str, list[Turn]] = {name: [] for name in CONTESTANTS}
    busy: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    first, ended = {}, {}
    order = list(CONTESTANTS)
    shuffle = random.Random(0)
    with contestants(module, folder) as started:
        for _, pipe in started.values():
            pipe.recv()
        for name, (_, pipe) in started.items():
            for number in range(WARM_UP.get(name, 1)):
                pipe.send(0)
                turn: Turn = pipe.recv()
                first[name] = max(first.get(name, 0.0), turn.gap + turn.join) if number else turn.gap + turn.join
                os.sync()
        others = Others([process.pid for process, _ in started.values()])
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                turn, cores = undisturbed(started[name][1], repeats, others)
                turns[name].append(turn)
                busy[name].append(cores)
        for name, (process, pipe) in started.items():
            pipe.send(None)
            ended[name] = pipe.recv()
            process.join(20)
    return rows_of(state_mb, turns, first, ended, busy)


def rows_of(
    state_mb: float,
    turns: dict[str, list[Turn]],
    first: dict[str, float],
    ended: dict[str, Ended],
    busy: dict[str, list[float]],
) -> list[dict[str, Any]]:
    """Return a row per contestant, then one per goal."""
    ordinary = [statistics.median(turn.ordinary for turn in of_round) for of_round in zip(*turns.values(), strict=True)]
    blocked, rows = {}, []
    for name, own in turns.items():
        gap, join = statistics.median(turn.ordinary_gap for turn in own), statistics.median(turn.ordinary_join for turn in own)
        blocked[name] = [turn.gap - gap + turn.join - join for turn in own]
    median = {name: statistics.median(taken) for name, taken in blocked.items()}
    for name, own in turns.items():
        usual_join = statistics.median(turn.ordinary_join for turn in own)
        longer = [turn.following - (turn.join - usual_join) - 10 * step for turn, step in zip(own, ordinary, strict=True)]
        rows.append(
            {
                "part": "saves",
                "state_mb": state_mb,
                "contestant": name,
                "saves": len(own),
                "blocked_median_ms": f"{1e3 * median[name]:.2f}",
                "blocked_p99_ms": f"{1e3 * np.percentile(blocked[name], 99):.2f}",
                "times_less_than_model_checkpoint": f"{median[STOCK] / median[name]:.2f}",
                "times_memcpy": f"{median[name] / median[FLOOR]:.3f}",
                "next_10_longer_median_ms": f"{1e3 * statistics.median(longer):.1f}",
                "next_10_longer_p99_ms": f"{1e3 * np.percentile(longer, 99):.1f}",
                "first_ms": f"{1e3 * first[name]:.1f}",
                "step_ms": f"{1e3 * statistics.median(turn.ordinary for turn in own):.1f}",
                "forward_backward_ms": f"{1e3 * statistics.median(turn.forward_backward for turn in own):.1f}",
                "trainer_peak_mb": f"{ended[name].peak_mb:.0f}",
                "trainer_extra_mb": f"{ended[name].peak_mb - ended[name].before_mb:.0f}",
                "of_it_shared_mb": f"{ended[name].shared_mb:.0f}",
                "keeper_mb": f"{ended[name].keeper_mb:.0f}",
                "tensors": ended[name].tensors,
                "settings": ended[name].setting,
                "others_cores": f"{statistics.median(busy[name]):.2f}",
                "disturbed_saves": sum(cores >= DISTURBED_CORES for cores in busy[name]),
                **{f"{part}_ms": f"{1e3 * seconds:.2f}" for part, seconds in median_parts(own)},
            }
        )
    goals = (
        (EAGER, "times_less_than_model_checkpoint", f">= {STOCK_RATIO:g}", lambda ratio: ratio >= STOCK_RATIO),
        (EAGER, "times_memcpy", f"<= {FLOOR_RATIO:g}", lambda ratio: ratio <= FLOOR_RATIO),
        (LAZY, "times_memcpy", "< 1", lambda ratio: ratio < 1),
    )
    for name, column, goal, is_held in goals:
        value = next(row[column] for row in rows if row["contestant"] == name)
        verdict = "held" if is_held(float(value)) else "MISSED"
        rows.append({"part": "goal", "state_mb": state_mb, "contestant": name, column: value, "goal": goal, "verdict": verdict})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = ("state_mb", "contestant", "saves", "blocked_median_ms", "blocked_p99_ms", "times_less_than_model_checkpoint")
    columns = (*columns, "times_memcpy", "next_10_longer_median_ms", "first_ms", "step_ms", "trainer_extra_mb", "keeper_mb")
    for row in rows:
        shown = [str(row.get(name, "")) for name in (*columns, "others_cores", "goal", "verdict")]
        print("{:>6} {:36} {:>3} {:>9} {:>9} {:>8} {:>7} {:>9} {:>8} {:>7} {:>6} {:>6} {:>5} {} {}".format(*shown))
        if parts := [f"{name} {row[name]}" for name in row if name in PART_COLUMNS]:
            print(" " * 8 + ", ".join(parts))


PART_COLUMNS = tuple(f"{part}_ms" for part in ("settle", "state", "split", "pack", "begin", "copy", "seal", "follow"))


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw all sizes."""
    measured: dict[str, list[Blocked]] = {}
    for row in rows:
        if row["part"] == "saves":
            numbers = [float(row[name]) for name in ("blocked_median_ms", "blocked_p99_ms", "next_10_longer_median_ms")]
            measured.setdefault(row["contestant"], []).append(Blocked(float(row["state_mb"]), *numbers))
    title = "How long a save holds up the training, one process on CPU, and how much longer the ten steps after it are"
    with atomic_write(PICTURE) as file:
        file.write(draw_blocked_times(measured, title))


def main() -> None:
    """Measure, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=list(ROUNDS), help="MB")
    parser.add_argument("--rounds", type=int, nargs="+", help="of each size")
    parser.add_argument("--tiny", action="store_true", help="try it out: small and short, nothing is written")
    given = parser.parse_args()
    sizes = [50.0] if given.tiny else given.sizes
    rounds = [3] * len(sizes) if given.tiny else given.rounds or [ROUNDS.get(int(size), 3) for size in sizes]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start_s, rows = time.perf_counter(), []
    (ROOT / "runs").mkdir(exist_ok=True)
    for size, count in zip(sizes, rounds, strict=True):
        # On the disk of the project; the system's temporary folder may be memory.
        with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, tempfile.TemporaryDirectory() as private:
            os.environ["XDG_RUNTIME_DIR"] = private  # a keeper of its own
            rows += measure(size, count, Path(folder))
        print(f"{size:g} MB: {time.perf_counter() - start_s:.0f} s", flush=True)
        if not given.tiny:
            print("wrote", write_results("memory_checkpoint_blocked", rows), flush=True)
    report(rows)
    if not given.tiny:
        draw(rows)


if __name__ == "__main__":
    main()
