"""Lives of a small training that is really killed: for goodput.py, in a process of its own that forks every life.

    python benchmarks/_goodput.py < PLAN.json > OUTCOME.json

A life is a process that reads the checkpoint, trains a linear regression in steps of a fixed length, writes the state after
every few steps, atomically and at the end of a standstill of a fixed length, and reports what it does through a pipe, which
outlives it. This process draws how long each life runs from the first step on, kills it with SIGKILL, waits for the recovery,
and starts the next. No other thread runs here, so that forking is safe, and a life starts in milliseconds.
"""

import json
import math
import os
import select
import signal
import struct
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.atomic import atomic_write

RESUMED, STEP, STALL = b"R", b"S", b"C"
RECORD = struct.Struct("<cd")  # what was done, and the seconds it took; for RESUMED the clock's reading
START_WITHIN_S = 20.0
FEATURES, SAMPLES, RATE = 8, 32, 0.05
TASK = np.random.default_rng(0).standard_normal((SAMPLES, FEATURES + 1))


@dataclass(frozen=True)
class Plan:
    """What a repetition does; seconds are of the compressed clock."""

    mtbf_s: float
    recovery_s: float
    load_s: float
    step_s: float
    steps_per_checkpoint: int
    stall_s: float
    lives: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What was measured over all lives; means in seconds."""

    lives: int
    counted_steps: int
    wall_s: float
    step_s: float
    stall_s: float
    recovery_and_load_s: float
    mtbf_s: float


def draw_lives_s(plan: Plan) -> NDArray[np.float64]:
    """Return exponential lives, one from each of ``lives`` equally likely ranges, in a random order.

    Each is exponential with the mean of the plan; together they have no accidental mean, which plain draws need hundreds of
    lives to get rid of.
    """
    generator = np.random.default_rng(plan.seed)
    quantiles = (generator.permutation(plan.lives) + generator.random(plan.lives)) / plan.lives
    return -plan.mtbf_s * np.log1p(-quantiles)


def train_step(state: NDArray[np.float64]) -> None:
    """Count the step in ``state[0]`` and descend along the gradient of the mean squared error in the weights that follow."""
    inputs, targets = TASK[:, :-1], TASK[:, -1]
    state[1:] -= RATE / SAMPLES * inputs.T @ (inputs @ state[1:] - targets)
    state[0] += 1


def read_state(path: Path) -> NDArray[np.float64]:
    """Return the step and the weights that are on disk, or those of the beginning."""
    return np.load(path, allow_pickle=False) if path.exists() else np.zeros(1 + FEATURES)


def life(plan: Plan, path: Path, pipe: int) -> NoReturn:
    """Load, then train and take checkpoints until killed."""
    started_s = time.monotonic()
    state = read_state(path)
    sleep_until(started_s + plan.load_s)
    began_s = time.monotonic()
    os.write(pipe, RECORD.pack(RESUMED, began_s))
    while True:
        for _ in range(plan.steps_per_checkpoint):
            train_step(state)
            sleep_until(began_s + plan.step_s)
            began_s = report(pipe, STEP, began_s)
        # The standstill counts as survived only when it is over, so the file takes its name at the end of it.
        with atomic_write(path) as file:
            np.save(file, state)
            sleep_until(began_s + plan.stall_s)
        began_s = report(pipe, STALL, began_s)


def sleep_until(when_s: float) -> None:
    """Sleep until the monotonic clock shows ``when_s``; not at all if it does already."""
    time.sleep(max(0.0, when_s - time.monotonic()))


def report(pipe: int, kind: bytes, began_s: float) -> float:
    """Tell how long something took and return when it ended; raises once nobody reads, so that no life is left behind."""
    ended_s = time.monotonic()
    os.write(pipe, RECORD.pack(kind, ended_s - began_s))
    return ended_s


def start(plan: Plan, path: Path) -> tuple[int, int]:
    """Fork a life and return its process id and the reading end of its pipe."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    try:
        os.close(reading)
        life(plan, path, writing)
    finally:
        os._exit(1)


def read_records(pipe: int, until_s: float) -> list[tuple[bytes, float]]:
    """Return what a life reports until the clock shows ``until_s``, or until its end."""
    received = b""
    while select.select([pipe], [], [], max(0.0, until_s - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        received += part
    return list(RECORD.iter_unpack(received[: len(received) // RECORD.size * RECORD.size]))


def run(plan: Plan, folder: Path) -> Outcome:
    """Run all lives and return what they took.

    Raises:
        RuntimeError: if a life ends or hangs by itself, or the state on disk is not that of an undisturbed training.
    """
    path = folder / "state.npy"
    down_s, lived_s = [], []
    records: dict[bytes, list[float]] = {STEP: [], STALL: []}
    began_s = ended_s = time.monotonic()
    for life_s in draw_lives_s(plan):
        sleep_until(ended_s + plan.recovery_s)
        process, pipe = start(plan, path)
        try:
            if not select.select([pipe], [], [], START_WITHIN_S)[0] or len(first := os.read(pipe, RECORD.size)) < RECORD.size:
                raise RuntimeError("a life did not reach its first step")
            resumed_s = RECORD.unpack(first)[1]
            seen = read_records(pipe, resumed_s + life_s)
        finally:
            os.kill(process, signal.SIGKILL)
            killed_s = time.monotonic()
            status = os.waitpid(process, 0)[1]
        if not os.WIFSIGNALED(status):
            raise RuntimeError("a life ended by itself")
        seen += read_records(pipe, killed_s + START_WITHIN_S)  # ends at the end of the pipe
        os.close(pipe)
        for kind, seconds in seen:
            records[kind].append(seconds)
        down_s.append(resumed_s - ended_s)
        lived_s.append(killed_s - resumed_s)
        ended_s = killed_s
    state = read_state(path)
    undisturbed = np.zeros_like(state)
    for _ in range(int(state[0])):
        train_step(undisturbed)
    if state.tobytes() != undisturbed.tobytes():
        raise RuntimeError("the state on disk is not that of an undisturbed training of as many steps")
    step_s, stall_s = (float(np.mean(records[kind])) if records[kind] else math.nan for kind in (STEP, STALL))
    return Outcome(plan.lives, int(state[0]), ended_s - began_s, step_s, stall_s, float(np.mean(down_s)), float(np.mean(lived_s)))


def main() -> None:
    """Read a plan, run it, print the outcome."""
    plan = Plan(**json.load(sys.stdin))
    # A disk that others use at the same time would add its delays to the standstill.
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="goodput-", dir=fast) as folder:
        json.dump(asdict(run(plan, Path(folder))), sys.stdout)


if __name__ == "__main__":
    main()
