"""The trainer's side of the disk writer: start it, tell it of committed steps, ask what it has done.

Nothing here waits for a disk.

writer = DiskWriter("steps", client.folder, client.job, ["shared", "rank0"])
writer.persist(100)          # once the step is committed; returns at once
writer.status().newest       # the newest step that is on the disk
writer.close(clean=True)     # the run needs no going on; if the trainer dies instead, the writer writes the newest step
"""

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lightning_plugins._support.errors import InputError, one_line
from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.disk_pieces import Share
from lightning_plugins.engines.resilience.disk_steps import steps

_MODULE = "lightning_plugins.engines.resilience.disk_writer"
_STARTS = 3


class WriterStatus(NamedTuple):
    """What a writer has done.

    Attributes:
        newest: newest step of this run that is on the disk, -1 if none is.
        writing: step that is being written, -1 if none is.
        waiting: step that is written next, -1 if none is.
        skipped: how many steps were left out, since a newer one came before their turn.
        failures: step and reason of the last ten failures; -1 stands for the newest step.
        is_running: whether the process runs.
    """

    newest: int = -1
    writing: int = -1
    waiting: int = -1
    skipped: int = 0
    failures: tuple[tuple[int, str], ...] = ()
    is_running: bool = True


class DiskWriter:
    """A process that writes committed steps; one per node.

    Args:
        disk_dir: the job's folder of steps, made if it is not there.
        keeper_folder: ``KeeperClient.folder``.
        job: of the keeper.
        shards: that make a step whole.
        keep: how many whole steps stay on the disk, 1 or more.
        owner: name of the job in ``run.json``, which has to be the same when the run is started again; ``job`` if left out.
        linger_s: the same as for ``KeeperClient``.
        resumed_from: step that the run goes on from, wherever that came from. With its first step the writer removes all that
            are newer; with None, a run that begins afresh, it removes all.
        share: on several hosts, what this one has to do with a step; ``shards`` are then those that it writes, and the ``meta``
            of what is captured holds the name of the start's folder as ``start``.

    Attributes:
        is_ready: whether the process has answered, which it does some seconds after its start.

    Raises:
        InputError: for bad values; for a folder that belongs to another job, is read-only, or whose disk is full.
    """

    def __init__(
        self,
        disk_dir: str | Path,
        keeper_folder: str | Path,
        job: str,
        shards: Sequence[str],
        keep: int = 2,
        *,
        owner: str | None = None,
        linger_s: float = 300.0,
        resumed_from: int | None = None,
        share: Share | None = None,
    ) -> None:
        if keep < 1 or not shards:
            raise InputError(f"keep must be 1 or more and shards not empty, got {keep} and {list(shards)}; keep=2 has a reserve")
        self.disk_dir = Path(disk_dir).absolute()
        disk_folder.claim(self.disk_dir, owner or job)
        self._options: dict[str, Any] = {"disk_dir": str(self.disk_dir), "keeper_folder": str(Path(keeper_folder).absolute())}
        self._options |= {"job": job, "owner": owner or job, "shards": list(shards), "keep": keep, "linger_s": linger_s}
        self._options["share"] = share
        self._options["resumed_from"] = past = -1 if resumed_from is None else resumed_from
        whole = [one.step for one in steps(self.disk_dir, thorough=False) if not one.damage and one.step <= past]
        self._options["newest"] = max(whole, default=-1)
        self._last = WriterStatus(newest=self._options["newest"])
        self._starts = self._questions = 0
        self._told = -1
        self._marks_end = share is None or share.node == 0
        self._process = self._start()
        _writers.add(self)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def newest(self) -> int:
        """Newest step on the disk, when ``status`` was last asked for."""
        return self._last.newest

    def persist(self, step: int) -> None:
        """Have a committed step written soon; errors as for ``revive``."""
        self.revive()
        self._told = step
        self._say(f"persist {step}")

    def revive(self) -> None:
        """Start a writer again that has died.

        Raises:
            InputError: if it has died three times.
        """
        if self._process.poll() is not None and self._input is not None:
            if self._starts == _STARTS:
                raise InputError(f"the process that writes into {self.disk_dir} has died {_STARTS} times; see what ends it")
            self._options["resumed_from"] = max(self._options["resumed_from"], self._last.newest)
            self._options["newest"] = self._last.newest
            self._leave()
            self._told = -1
            self._process = self._start()

    def give_up(self, step: int, reason: str) -> None:
        """Have a step not waited for any more, of which another host says that its piece will not come."""
        self._say(f"give_up {step} {one_line(reason)}")

    @property
    def unfinished(self) -> int:
        """The step that it was last told of, as long as ``status`` has shown it neither written nor failed; else -1."""
        failed = any(step == self._told for step, _ in self._last.failures)
        return -1 if failed or self._told <= self._last.newest else self._told

    def status(self, timeout_s: float = 1.0) -> WriterStatus:
        """Return what the writer has done; the last that is known of one that has ended, or does not answer in time."""
        self._questions += 1
        if self._say(f"status {self._questions}"):
            deadline = time.monotonic() + timeout_s
            while (line := self._read_line(deadline)) is not None:
                self.is_ready = True
                fields = json.loads(line)
                question = fields.pop("question")
                fields["failures"] = tuple((step, reason) for step, reason in fields["failures"])
                self._last = WriterStatus(**fields)
                if question == self._questions:
                    break  # the others are late answers to what was asked before
        return self._last._replace(is_running=self._process.poll() is None)

    def close(self, clean: bool, timeout_s: float = 60.0) -> None:
        """Part from the writer.

        Args:
            clean: True says that the run has ended and needs no going on: the writer ends after the step that it was last told
                of, and the folder is marked. False leaves it to write the newest committed step by itself.
            timeout_s: how long to wait for its end; it is not ended by force.
        """
        if self._input is None:
            return
        if clean:
            self._say("close")
        self._leave()
        if clean:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
            if self._marks_end:
                with suppress(OSError):
                    disk_folder.mark_ended(self.disk_dir)

    def _start(self) -> "subprocess.Popen[bytes]":
        self._starts += 1
        self.is_ready = False
        # One thread of arithmetic and no accelerator: the trainer wants both.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, json.dumps(self._options)],
            cwd=Path(__file__).parents[3],  # so that it imports the same package wherever the trainer has it from
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a trainer's, if it were kept open, would keep its launcher waiting
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: int | None = os.dup(process.stdin.fileno())
        self._output = os.dup(process.stdout.fileno())
        process.stdin.close()
        process.stdout.close()
        os.set_blocking(self._input, False)
        self._read = b""
        return process

    def _say(self, line: str) -> bool:
        """Send a line, unless the writer has gone or is not listening: the training does not wait for it."""
        try:
            return self._input is not None and os.write(self._input, f"{line}\n".encode()) > 0
        except (BrokenPipeError, BlockingIOError):
            return False

    def _read_line(self, deadline: float) -> bytes | None:
        """Return the next whole line of output, None if none comes in time."""
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._output, 1 << 16) if ready else b""
            if not part:
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _leave(self) -> None:
        if self._input is not None:
            os.close(self._input)
            os.close(self._output)
            self._input = None


_writers: "weakref.WeakSet[DiskWriter]" = weakref.WeakSet()


def _leave_pipes() -> None:
    """Close, in a forked child such as a loader's worker, what it inherited: else the writer would not see its trainer die."""
    for writer in list(_writers):
        writer._leave()


os.register_at_fork(after_in_child=_leave_pipes)
