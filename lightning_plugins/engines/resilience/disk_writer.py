"""The disk writer: a process that brings committed steps from the keeper's memory to the disk, behind the training's back.

    python -m lightning_plugins.engines.resilience.disk_writer OPTIONS_AS_JSON

A line on standard input tells it what to do: ``persist STEP``, ``status NUMBER`` (answered by a line of JSON), ``give_up STEP
REASON``, ``close``. There is no queue: told of newer steps while it writes, it takes the newest and counts the others. If its
input ends without ``close``, the trainer has died: it writes the newest committed step that is not on the disk yet, and ends. It
has a session of its own, so that nothing that ends a trainer ends it, and a low claim on the processor.

On several hosts each one's writer writes a piece, see ``disk_pieces``, and node 0's the step. All are told of the same steps; of
the last step, for which nobody is left to tell, node 0's writer tells the others in a file.
"""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_plugins._support.errors import one_line
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience import disk, disk_folder, disk_pieces
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import KeeperError, KeeperLostError

NICENESS = 10
FAILURES_KEPT = 10
LOG = "writer.log"
_LONGEST_WAIT_S = 1.0
_TRIES = 5  # to read a step before it is overwritten


class Writer:
    """Writes the newest step that it is told of.

    Args:
        disk_dir: the job's folder of steps.
        keeper_folder: where the keeper's socket is.
        job: of the keeper.
        owner: name of the job in ``run.json``.
        shards: that make a step whole.
        keep: how many steps stay on the disk.
        linger_s: of the keeper's clients of this job.
        resumed_from: step that the run went on from; -1 if none, and then nothing of what is in the folder is its past.
        newest: newest step of its past in the folder, -1 if there is none.
        share: see ``disk_pieces.Share``; None on one host.
    """

    def __init__(
        self,
        disk_dir: str,
        keeper_folder: str,
        job: str,
        owner: str,
        shards: list[str],
        keep: int,
        linger_s: float,
        resumed_from: int,
        newest: int,
        share: list[Any] | None,
    ) -> None:
        self.disk_dir, self.keeper_folder = Path(disk_dir), Path(keeper_folder)
        self.job, self.owner, self.shards, self.keep = job, owner, shards, keep
        self.linger_s, self.resumed_from = linger_s, resumed_from
        self.share = None if share is None else disk_pieces.Share(*share)
        self._client: KeeperClient | None = None
        self._changed = threading.Condition()
        self._wanted = self._writing = -1
        self._newest = newest
        self._has_written = self._closed = self._clean = False
        self._skipped = 0
        self._given_up: dict[int, str] = {}
        self._failures: list[tuple[int, str]] = []

    def listen(self) -> None:
        """Take commands until there are no more; in a thread of its own, so that they are taken while a step is written."""
        try:
            for line in iter(sys.stdin.buffer.readline, b""):
                word, _, rest = line.decode().strip().partition(" ")
                if word == "persist":
                    self._want(int(rest))
                elif word == "status":
                    os.write(sys.stdout.fileno(), json.dumps({"question": int(rest), **self.status()}).encode() + b"\n")
                elif word == "give_up":
                    number, _, reason = rest.partition(" ")
                    self._given_up[int(number)] = reason
                elif word == "close":
                    self._clean = True
                    break
        except OSError:
            pass  # whoever asked has gone
        finally:
            self.stop()

    def stop(self, *signal_and_frame: object) -> None:
        """Have ``run`` end after one more step."""
        threading.Thread(target=self._close, daemon=True).start()  # a signal may come while the condition is held

    def run(self) -> None:
        """Write what is asked for, until the end of the input."""
        self._connect()
        while True:
            with self._changed:
                # With an end: a signal that comes right before the waiting begins is handled only after it.
                self._changed.wait_for(lambda: self._wanted >= 0 or self._closed, _LONGEST_WAIT_S)
                step, self._wanted, closed = self._wanted, -1, self._closed
                self._writing = step
            if step < 0:
                if closed:
                    break
                continue
            self._attempt(step)
        if not self._clean:
            self._attempt(-1)
        elif self._completes and self.disk_dir.exists():
            disk_folder.mark_ended(self.disk_dir)

    def status(self) -> dict[str, Any]:
        """Return what there is to know."""
        with self._changed:
            return {
                "newest": self._newest,
                "writing": self._writing,
                "waiting": self._wanted,
                "skipped": self._skipped,
                "failures": self._failures[-FAILURES_KEPT:],
            }

    def _want(self, step: int) -> None:
        with self._changed:
            self._skipped += self._wanted >= 0
            self._wanted = step
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _attempt(self, step: int) -> None:
        """Write a step, -1 for the newest; a failure is noted, and the next step may do better."""
        reason, written = "", -1
        try:
            written = self._persist(step)
        except Exception as error:  # whatever it is, it costs the disk tier only
            reason = one_line(str(error)) or type(error).__name__
        with self._changed:
            self._newest, self._writing = max(self._newest, written), -1
            if reason:
                self._failures.append((step, reason))
        if reason and self._closed and not self._clean and self.disk_dir.exists():
            with (self.disk_dir / LOG).open("a") as file:  # nobody is left to ask
                file.write(f"the newest step could not be written after the trainer had gone: {reason}\n")

    @property
    def _completes(self) -> bool:
        """Whether steps get their names from this writer."""
        return self.share is None or self.share.node == 0

    def _persist(self, step: int) -> int:
        """Write the given step, or the newest that is committed if it is not there any more; return which."""
        if self.share is not None:
            return self._persist_share(self.share, step)
        disk_folder.claim(self.disk_dir, self.owner)
        for attempt in range(_TRIES):
            client = self._connect()
            if client is None:
                if step < 0:
                    return -1  # the job has ended
                raise self._no_keeper(step)
            committed = self._held(client, ("committed",))
            chosen = step if step in committed else max(committed, default=-1)
            if chosen < 0 or chosen == self._newest:
                return chosen
            try:
                states, meta = self._load(client, chosen)
                break
            except KeeperError:  # overwritten in the meantime: there is a newer one
                if attempt == _TRIES - 1:
                    raise
        if not self._has_written:
            disk_pieces.remove_starts(self.disk_dir)
        disk.write_step(self.disk_dir, chosen, states, meta, self.keep, past=self._past())
        self._note_written()
        return chosen

    def _persist_share(self, share: disk_pieces.Share, step: int) -> int:
        """Write this node's piece of exactly the given step, -1 for the last, and as node 0 the step; return which."""
        client = self._connect()
        if step < 0:
            step = self._agreed_last(share, client)
        if step < 0 or disk_pieces.is_written(self.disk_dir, share, step):
            return step
        if not disk_pieces.has_piece(share, step):
            if client is None:
                raise self._no_keeper(step)
            # What is the job's may only be sealed here, if the trainer died in between.
            if step not in self._held(client, ("sealed", "committed")):
                raise KeeperError(f"step {step} was overwritten in memory before it could be read")
            states, meta = self._load(client, step)
            disk_pieces.write_piece(share, step, states, meta)
        if self._completes:
            disk_pieces.complete(self.disk_dir, share, step, self.keep, self._past(), lambda one: self._given_up.get(one, ""))
            self._note_written()
        return step

    def _agreed_last(self, share: disk_pieces.Share, client: KeeperClient | None) -> int:
        """Return which step is to be finished after the trainers' death: the newest that node 0 has."""
        if not self._completes:
            return disk_pieces.await_last(share)
        last = -1 if client is None else max(self._held(client, ("committed",)), default=-1)
        disk_pieces.announce_last(share, last)
        return last

    def _load(self, client: KeeperClient, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        failpoint("resilience/disk/load")
        loaded = {shard: client.load(shard, step) for shard in self.shards}
        return {shard: state for shard, (state, _) in loaded.items()}, next(iter(loaded.values()))[1]

    def _past(self) -> int | None:
        return None if self._has_written else self.resumed_from

    def _note_written(self) -> None:
        if not self._has_written:
            disk_folder.mark_ended(self.disk_dir, False)
            self._has_written = True

    def _no_keeper(self, step: int) -> KeeperError:
        return KeeperError(f"step {step} is in no keeper's memory any more; the run has ended, or the keeper has died")

    def _held(self, client: KeeperClient, states: tuple[str, ...]) -> set[int]:
        """Return the steps of which all of this writer's shards are in memory, on several hosts those of this start alone."""
        start = None if self.share is None else Path(self.share.start).name
        held = [one for one in client.generations() if one.state in states and start in (None, one.meta.get("start"))]
        return set.intersection(*({one.step for one in held if one.shard == shard} for shard in self.shards))

    def _connect(self) -> KeeperClient | None:
        """Return a client, or None where there is no keeper: this process starts none."""
        if self._client is not None:
            try:
                self._client.generations()
                return self._client
            except KeeperError:
                self._client.close()
                self._client = None
        with suppress(KeeperLostError):
            self._client = KeeperClient(self.job, linger_s=self.linger_s, folder=self.keeper_folder, start=False)
        return self._client


def main(arguments: list[str]) -> int:
    """Be the writer that the options describe."""
    os.nice(NICENESS)
    writer = Writer(**json.loads(arguments[0]))
    signal.signal(signal.SIGTERM, writer.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=writer.listen, daemon=True).start()
    writer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
