"""Where captured states go: this host's memory at once, the disk behind it; and where a run comes back from.

What goes wrong with a tier costs that tier, or its next captures, and never the training: it is logged. A keeper that is lost is
replaced by a new one, which is empty.
"""

import logging
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.agreement import first_reason
from lightning_plugins.engines.resilience.commit import JobCommit
from lightning_plugins.engines.resilience.disk_client import DiskWriter
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, TooLittleMemoryError
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.neighbours import Address, meet
from lightning_plugins.engines.resilience.recovery import Disk, Found, Memory, Meta, Neighbours, Source, find
from lightning_plugins.engines.resilience.shards import SHARED, own_shard, split
from lightning_plugins.engines.resilience.state_tree import pack

LEAVE_S = 1.0  # for the last capture to become the job's

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Which rank this is.

    Attributes:
        rank: among all.
        local_rank: on this host.
        ranks: their number.
        node: number of this host.
        nodes: number of hosts.
        toward: address of rank 0's host.
    """

    rank: int
    local_rank: int
    ranks: int
    node: int = 0
    nodes: int = 1
    toward: str = "127.0.0.1"


class Tiers:
    """The tiers of one rank.

    Args:
        job: name of the run and the fit.
        meta: what a state has to fit: plain values, ``world_size`` and ``module`` among them.
        place: of this rank.
        store: see ``JobCommit``.
        linger_s: see ``KeeperClient``.
        disk_dir: folder of steps, or None for no disk tier.
        disk_every_n_steps: steps between two that go to disk.

    Attributes:
        active: whether captures still have somewhere to go.

    Raises:
        InputError: if the folder is another run's.
    """

    def __init__(
        self,
        job: str,
        meta: Meta,
        place: Place,
        store: Store | None,
        linger_s: float,
        disk_dir: Path | None,
        disk_every_n_steps: int,
    ) -> None:
        self.active = True
        self._job, self._meta, self._place, self._store, self._linger_s = job, meta, place, store, linger_s
        self._disk_dir, self._disk_every = _claimed(disk_dir, job), disk_every_n_steps
        self._writer: DiskWriter | None = None
        self._resumed_from: int | None = None
        self._to_disk = 0  # newest step that has gone there, or that the run goes on from
        self._neighbours: list[Address] = []
        self._connect()

    @property
    def committed(self) -> int:
        """The newest step that is the job's, -1 before the first."""
        return self._commit.committed

    def find(self, resume: bool | str) -> Found | None:
        """Return what this rank goes on from, and drop what it does not; to be called on every rank.

        Args:
            resume: ``"auto"``, True or False, as ``MemoryCheckpoint`` has it.

        Raises:
            InputError: with ``resume=True``, on all ranks, if all that there is does not fit.
        """
        sources: list[Source] = [Memory(self._client, self._place.rank)]
        if self._neighbours:
            sources.append(Neighbours(self._client, self._neighbours, self._place.rank))
        if self._disk_dir is not None:
            sources.append(Disk(self._disk_dir, self._job, self._place.rank))
        found = find(sources, self._fits) if resume is not False else None
        if found is None and resume is not False:
            metas = [meta for source in sources for meta in source.metas().values() if not self._fits(meta)]
            # Another number of ranks leaves some of them without a state: all have to say the same.
            if misfit := first_reason(self._misfit(metas[0]) if metas else ""):
                if resume is True:
                    raise InputError(f"resume=True, and {misfit}; resume='auto' starts afresh")
                if self._place.rank == 0:
                    log.warning("starting afresh: %s", misfit)
        if found is not None:
            self._resumed_from = self._to_disk = found.step
        for one in self._client.generations():
            if one.shard in self._commit.shards and (found is None or one.step != found.step):
                self._client.discard(one.shard, one.step)
        return found

    def settle(self, patient_s: float = 0.0) -> None:
        """Make the last captured step final, and have it written to disk when it is time; see ``JobCommit.settle``."""
        try:
            self._commit.settle(patient_s)
        except KeeperError as error:
            self._replace_keeper(error)
        except TooLittleMemoryError as error:
            self._give_up(error)
        except (RuntimeError, OSError) as error:
            self._give_up(f"ranks cannot agree any more ({error})")
        if self.active and self.committed // self._disk_every > self._to_disk // self._disk_every:
            self._to_disk = self.committed
            self._write(self.committed)

    def capture(self, step: int, state: dict[str, Any], parameters: Set[str] | None, lazy: bool) -> int:
        """Copy what this rank captures; the step before is settled.

        Args:
            step: number.
            state: see ``shards.split``.
            parameters: see ``shards.split``.
            lazy: whether parameters and what optimizers keep of them are copied by a thread, until ``wait_copied``.

        Returns:
            Bytes.
        """
        shared, own = split(state, parameters)
        parts = {own_shard(self._place.rank): own, SHARED: shared}
        try:
            begun = {shard: self._client.begin(shard, pack(parts[shard]), step, self._meta) for shard in self._commit.shards}
            later = begun.get(SHARED) if lazy else None
            at_once = [writing for writing in begun.values() if writing is not later]
            for writing in at_once:
                writing.copy()
            for writing in at_once:  # checksums would take the processor from copies
                writing.seal()
        except KeeperError as error:
            self._replace_keeper(error)
            return 0
        except TooLittleMemoryError as error:
            self._give_up(error)
            return 0
        self._commit.follow(step, later)
        return sum(writing.bytes for writing in begun.values())

    def wait_copied(self) -> None:
        """Return when a lazy copy is done."""
        self._commit.copied.wait()

    def end(self) -> None:
        """The run has ended and needs no going on; all ranks have settled."""
        if self._place.local_rank == 0:
            if self._writer is not None:
                self._writer.close(clean=True)  # it still reads from the keeper what it was last told of
                self._writer = None
            elif self._disk_dir is not None:
                with suppress(OSError):
                    disk_folder.mark_ended(self._disk_dir)
            with suppress(KeeperError):
                self._client.end()
        self.leave()

    def leave(self) -> None:
        """Go; what is in memory stays for a while, and the newest step goes to disk if the disk has been written to."""
        self.active = False
        with suppress(Exception):  # whatever it is, there is no training any more to tell it
            self._commit.settle(LEAVE_S)
        if self._writer is not None:
            self._writer.close(clean=False)
        self._client.close()

    def _connect(self) -> None:
        self._client = KeeperClient(self._job, linger_s=self._linger_s)
        shards = [own_shard(self._place.rank), *([SHARED] if self._place.local_rank == 0 else [])]
        self._commit = JobCommit(self._client, shards, self._store, self._place.ranks)
        place = self._place
        if self._store is not None and place.nodes > 1:
            first = place.local_rank == 0
            self._neighbours = meet(self._client, self._store, place.node, place.nodes, first, place.toward)

    def _replace_keeper(self, error: object) -> None:
        log.warning("%s; MemoryCheckpoint goes on with a new one", error)
        self._client.close()
        self._connect()

    def _give_up(self, reason: object) -> None:
        log.warning("MemoryCheckpoint captures no more in this run: %s", reason)
        self.leave()

    def _write(self, step: int) -> None:
        """Have a committed step written, by one rank of the host."""
        if self._disk_dir is None or self._place.local_rank != 0:
            return
        try:
            if self._writer is None:
                shards = [SHARED, *(own_shard(rank) for rank in range(self._place.ranks))]
                self._writer = DiskWriter(
                    self._disk_dir,
                    self._client.folder,
                    self._job,
                    shards,
                    linger_s=self._linger_s,
                    resumed_from=self._resumed_from,
                )
            self._writer.persist(step)
            if failures := self._writer.status(0.0).failures:
                log.warning("the disk tier could not write step %d: %s", *failures[-1])
        except (InputError, OSError) as error:
            log.warning("no more states go to disk in this run: %s", error)
            self._disk_dir = None

    def _fits(self, meta: Meta) -> bool:
        return all(meta.get(name) == value for name, value in self._meta.items())

    def _misfit(self, meta: Meta) -> str:
        if meta.get("world_size") != self._meta["world_size"]:
            return f"there is a state of {meta.get('world_size')} ranks, and there are {self._meta['world_size']}"
        if meta.get("layout") != self._meta.get("layout"):
            return f"there is a state of ranks in the layout {meta.get('layout')}, and this is {self._meta.get('layout')}"
        return f"there is a state of {meta.get('module')} with other parameters than this {self._meta['module']}"


def _claimed(disk_dir: Path | None, job: str) -> Path | None:
    """Return the folder once it is the job's; one that cannot be written costs the disk tier only."""
    if disk_dir is None:
        return None
    try:
        disk_folder.claim(disk_dir, job)
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        log.warning("no states go to disk in this run: %s", error)
        return None
    return disk_dir
