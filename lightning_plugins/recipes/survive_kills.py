"""Who kills in the recipe ``survive``: a thread of the launcher, so never of a process that trains.

It draws, from the system's entropy, how far into the training each kill is to fall, and whom it hits; then it looks at nothing
but the clock. What it knows of the processes it reads in their journals.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_plugins.recipes.survive_journal import KILLS, Journal, Tail, process_file

_POLL_S = 0.02
# A process that has trained to its end cannot be killed in training: a kill comes at this share of all steps at the latest.
LATEST_SHARE = 0.9


def drawn_delays_s(count: int, training_s: float, generator: random.Random) -> list[float]:
    """Return how many seconds each start may train until it is killed.

    Args:
        count: of kills.
        training_s: seconds that the whole training takes; kills fall into its first nine tenths.
        generator: of random numbers.

    Returns:
        As many numbers, whose sums are spread evenly over the training.
    """
    moments = sorted(generator.uniform(0, LATEST_SHARE * training_s) for _ in range(count))
    return [moment - before for moment, before in zip(moments, [0.0, *moments], strict=False)]


class Watch(threading.Thread):
    """Follows the steps of a launch, and kills a process of each start, a drawn time after its first step.

    Args:
        launch: folder of the launch.
        processes: their number.
        steps: of the whole training.
        delays_s: for each start how long it may train; the starts after these are left alone.
        advance: called with the number of the last step of the first process, whenever there is a new one.
        tell: called with a sentence about every kill, and when the processes have gone on.
        generator: of random numbers, which draws the victims.
    """

    def __init__(
        self,
        launch: Path,
        processes: int,
        steps: int,
        delays_s: list[float],
        advance: Callable[[int], object],
        tell: Callable[[str], object],
        generator: random.Random,
    ) -> None:
        super().__init__(name="lightning_plugins-survive", daemon=True)
        self._launch, self._steps, self._delays_s = launch, steps, list(delays_s)
        self._advance, self._tell, self._generator = advance, tell, generator
        self._tails = [Tail(process_file(launch, rank)) for rank in range(processes)]
        self._last: list[dict[str, Any]] = [{} for _ in range(processes)]  # lines of the running start, by process
        self._pids = [0] * processes
        self._first_step_s: float | None = None
        self._killed_s: float | None = None
        self._restart = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Watch until the block ends."""
        while not self._ended.wait(_POLL_S):
            self._look()
            if self._is_due():
                self._kill()
        self._look()

    def _look(self) -> None:
        for rank, tail in enumerate(self._tails):
            for line in tail():
                if line["restart"] < self._restart:
                    continue  # of a start that has been killed: its other processes may have written on
                if line["restart"] > self._restart:
                    self._begin(line["restart"])
                self._last[rank] = line
                if rank == 0 and line["kind"] == "step":
                    self._advance(line["step"])
                if line["kind"] == "start":
                    self._pids[rank] = line["pid"]
                elif line["kind"] == "step" and self._first_step_s is None:
                    self._first_step_s = line["seconds"]
                    if self._killed_s is not None:
                        later_s = self._first_step_s - self._killed_s
                        self._tell(f"went on after step {line['step'] - 1}, {later_s:.1f} s after the kill")

    def _is_due(self) -> bool:
        """Tell whether this start's time has come: all of its processes train, and none has come to the end."""
        if not self._delays_s or self._first_step_s is None or any(line.get("kind") != "step" for line in self._last):
            return False
        late = self._last[0]["step"] >= LATEST_SHARE * self._steps
        return late or time.monotonic() - self._first_step_s >= self._delays_s[0]

    def _kill(self) -> None:
        victim = self._generator.randrange(len(self._pids))
        self._killed_s = seconds = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self._pids[victim], signal.SIGKILL)
        self._look()  # what the victim had still written
        step = self._last[victim].get("step", self._steps)  # the line about its end has none
        journal = Journal(self._launch / KILLS)
        journal.write(restart=self._restart, process=victim, step=step, seconds=seconds)
        journal.close()
        self._tell(f"SIGKILL of process {victim} after step {step} of {self._steps}")
        self._delays_s.pop(0)
        self._begin(self._restart + 1)

    def _begin(self, restart: int) -> None:
        self._restart = restart
        self._first_step_s = None
        self._last = [{} for _ in self._last]
