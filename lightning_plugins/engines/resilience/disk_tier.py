"""The disk tier as a rank sees it: which of the committed steps go to disk, who writes them, and what is said when that fails.

On several hosts all writers have to take the same step, though each leaves out steps while it is busy. Node 0 decides, since its
writer is the last to be done: before a step is captured it allows it in the store, if all writers have started and its own is not
at work. Rank 0 has captured whatever is committed, so what it has allowed is there to be read when others see the step committed.
A step that is due and not allowed is left out, and the next capture is due instead.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import disk_folder, disk_pieces, disk_start
from lightning_plugins.engines.resilience.disk_client import DiskWriter
from lightning_plugins.engines.resilience.disk_pieces import Share
from lightning_plugins.engines.resilience.place import Place
from lightning_plugins.engines.resilience.recovery import Disk

log = logging.getLogger(__name__)


class DiskTier:
    """The disk tier of one rank; what goes wrong costs the tier, or a step, and is logged.

    Args:
        disk_dir: folder of steps, or None for no disk tier; on several hosts it has to be on storage that all of them see.
        job: name of the run and the fit.
        place: of this rank.
        store: reached by all ranks, without anything of an earlier start in it; None for a single rank.
        every_n_steps: steps between two that go to disk.
        linger_s: see ``KeeperClient``.

    Attributes:
        meta: what has to travel with each capture.

    Raises:
        InputError: if the folder is another run's.
    """

    def __init__(
        self, disk_dir: Path | None, job: str, place: Place, store: Store | None, every_n_steps: int, linger_s: float
    ) -> None:
        self.meta: dict[str, Any] = {}
        self._job, self._place, self._store, self._every, self._linger_s = job, place, store, every_n_steps, linger_s
        self._writer: DiskWriter | None = None
        self._failures: set[tuple[int, str]] = set()  # that have been logged
        self._resumed_from: int | None = None
        self._to_disk = 0  # newest step that has gone there, or that the run goes on from
        self._start: Path | None = None
        self._to_read = self._to_write = disk_dir
        if disk_dir is None:
            return
        if store is not None and place.nodes > 1:
            opened = disk_start.open_together(disk_dir, job, place, store)
            self._to_read = disk_dir if opened.is_readable else None
            self._start = opened.start
            if opened.start is None:
                self._to_write = None
            else:
                self.meta["start"] = opened.start.name
        else:
            self._to_read = self._to_write = _claimed(disk_dir, job)

    @property
    def newest(self) -> int:
        """Newest step that is known to be on the disk, -1 if none is."""
        return -1 if self._writer is None else self._writer.newest

    def source(self) -> Disk | None:
        """Return where states may be read from."""
        return None if self._to_read is None else Disk(self._to_read, self._job, self._place.rank)

    def go_on_from(self, step: int) -> None:
        """Say which step the run goes on from."""
        self._resumed_from = self._to_disk = step

    def capturing(self, step: int) -> None:
        """A capture begins, on every rank."""
        if self._place.rank != 0 or self._start is None or self._to_write is None or not self._is_due(step):
            return
        if reason := self._ask("disk/off"):
            log.warning("no more states go to disk in this run: %s", reason)
            self._to_write = None
        elif (
            self._writer is not None
            and self._writer.unfinished < 0
            and all(self._ask(f"disk/ready/{node}") for node in range(self._place.nodes))
        ):
            self._tell(f"disk/go/{step}", "1")

    def settled(self, committed: int, keeper_folder: Path) -> None:
        """The capture before has become the job's, or has not; ``committed`` is the newest that has."""
        if not self._place.is_first_of_node or self._to_write is None:
            return
        try:
            if self._start is not None:  # early, since what is written has to be read before it is overwritten in memory
                self._writer = self._writer or self._made(self._to_write, keeper_folder)
            if self._writer is not None:
                self._look(self._writer)
            if self._is_due(committed) and (self._start is None or self._ask(f"disk/go/{committed}")):
                self._to_disk = committed
                self._writer = self._writer or self._made(self._to_write, keeper_folder)
                self._writer.persist(committed)
        except (InputError, OSError) as error:
            log.warning("no more states go to disk in this run: %s", error)
            self._to_write = None
            self._tell(f"disk/lost/{committed}", self._named(error))
            self._tell("disk/off", self._named(error))

    def end(self) -> None:
        """The run has ended and needs no going on."""
        if not self._place.is_first_of_node:
            return
        if self._writer is not None:
            self._writer.close(clean=True)  # it still reads from the keeper what it was last told of
            self._writer = None
        elif self._to_read is not None and self._place.node == 0:  # steps that were only read from need no going on either
            with suppress(OSError, InputError):
                disk_folder.mark_ended(self._to_read)
        if self._start is not None and self._place.node == 0:
            disk_pieces.remove_start(self._start)

    def leave(self) -> None:
        """Leave the newest step to the writer, if there is one."""
        if self._writer is not None:
            self._writer.close(clean=False)

    def _is_due(self, step: int) -> bool:
        return step // self._every > self._to_disk // self._every

    def _made(self, disk_dir: Path, keeper_folder: Path) -> DiskWriter:
        return DiskWriter(
            disk_dir,
            keeper_folder,
            self._job,
            self._place.shards_to_disk,
            linger_s=self._linger_s,
            resumed_from=self._resumed_from,
            share=None if self._start is None else Share(str(self._start), self._place.node, self._place.nodes),
        )

    def _look(self, writer: DiskWriter) -> None:
        """Ask the writer how it fares, start it again if it has died, and say so; on several hosts, to node 0 as well."""
        was_ready = writer.is_ready
        status = writer.status(0.0)
        failures = list(status.failures)
        if not status.is_running and writer.unfinished >= 0:
            failures.append((writer.unfinished, "the process that writes has died"))
        for step, reason in failures:
            if (step, reason) not in self._failures:
                self._failures.add((step, reason))
                log.warning("the disk tier could not write step %d: %s", step, reason)
                self._tell(f"disk/lost/{step}", self._named(reason))
        if not status.is_running:
            writer.revive()
        if writer.is_ready != was_ready:
            self._tell(f"disk/ready/{self._place.node}", "1" if writer.is_ready else "")
        if self._place.node == 0 and (step := writer.unfinished) >= 0 and (reason := self._ask(f"disk/lost/{step}")):
            writer.give_up(step, reason)

    def _named(self, reason: object) -> str:
        return f"{disk_start.host_name(self._place.node)}: {reason}"

    def _tell(self, key: str, value: str) -> None:
        """Tell the other hosts; if the store has gone with its rank, the training will notice by itself."""
        if self._store is not None and self._place.nodes > 1:
            with suppress(RuntimeError):
                self._store.set(key, value)

    def _ask(self, key: str) -> str:
        """Return what a host has told, empty if nothing."""
        if self._store is not None and self._place.nodes > 1:
            with suppress(RuntimeError):
                return bytes(self._store.get(key)).decode() if self._store.check([key]) else ""
        return ""


def _claimed(disk_dir: Path, job: str) -> Path | None:
    """Return the folder once it is the job's; one that cannot be written costs the disk tier only."""
    try:
        disk_folder.claim(disk_dir, job)
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        log.warning("no states go to disk in this run: %s", error)
        return None
    return disk_dir
