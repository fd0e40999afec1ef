"""Where captured states go: this host's memory at once, the disk behind it; and where a run comes back from.

What goes wrong with a tier costs that tier, or its next captures, and never the training: it is logged. A keeper that is lost is
replaced by a new one, which is empty.
"""

import logging
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.agreement import first_reason
from lightning_plugins.engines.resilience.commit import JobCommit
from lightning_plugins.engines.resilience.disk_tier import DiskTier
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, TooLittleMemoryError
from lightning_plugins.engines.resilience.keeper_folder import KeeperError, KeeperLostError
from lightning_plugins.engines.resilience.neighbours import Met, follow, meet
from lightning_plugins.engines.resilience.place import Place as Place
from lightning_plugins.engines.resilience.recovery import Found, Memory, Meta, Neighbours, Source, find
from lightning_plugins.engines.resilience.shards import SHARED, own_shard, split
from lightning_plugins.engines.resilience.state_tree import pack

LEAVE_S = 1.0  # for the last capture to become the job's

log = logging.getLogger(__name__)


class Tiers:
    """The tiers of one rank.

    Args:
        job: name of the run and the fit.
        meta: what a state has to fit: plain values, ``world_size`` and ``module`` among them.
        place: of this rank.
        store: see ``JobCommit``.
        linger_s: see ``KeeperClient``.
        disk_dir: folder of steps, or None for no disk tier; see ``DiskTier``.
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
        self._disk = DiskTier(disk_dir, job, place, store, disk_every_n_steps, linger_s)
        self._met = Met([])
        self._captured_at: dict[int, float] = {}  # by step; no older ones than the tiers have
        self._connect()

    @property
    def committed(self) -> int:
        """The newest step that is the job's, -1 before the first."""
        return self._commit.committed

    def ages(self) -> dict[str, float]:
        """Return by tier for how many seconds a crash now would set the run back, as far as this start has filled the tier.

        Returns:
            ``memory``: of this host; ``neighbour``: the partner's, in whose memory all of this host's shards are; ``disk``.
        """
        newest = {"memory": self.committed, "disk": self._disk.newest}
        now = time.monotonic()
        ages = {tier: now - self._captured_at[step] for tier, step in newest.items() if step in self._captured_at}
        needed = min((step for step in newest.values() if step >= 0), default=0)
        self._captured_at = {step: at for step, at in self._captured_at.items() if step >= needed}
        if self._met.partner is not None:
            with suppress(KeeperError):
                if (age_s := self._client.peer_status().get("age_s")) is not None:
                    ages["neighbour"] = age_s
        return ages

    def find(self, resume: bool | str) -> Found | None:
        """Return what this rank goes on from, and drop what it does not; to be called on every rank.

        Args:
            resume: ``"auto"``, True or False, as ``MemoryCheckpoint`` has it.

        Raises:
            InputError: with ``resume=True``, on all ranks, if all that there is does not fit.
        """
        sources: list[Source] = [Memory(self._client, self._place.rank)]
        if self._met.others:
            sources.append(Neighbours(self._client, self._met.others, self._place.rank))
        if (disk := self._disk.source()) is not None:
            sources.append(disk)
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
            self._disk.go_on_from(found.step)
        for one in self._client.generations():
            if one.shard in self._commit.shards and (found is None or one.step != found.step):
                self._client.discard(one.shard, one.step)
        return found

    def settle(self, patient_s: float = 0.0) -> None:
        """Make the last captured step final, and have it written to disk when it is time; see ``JobCommit.settle``."""
        try:
            self._commit.settle(patient_s)
            self._follow_partner()
        except KeeperError as error:
            self._replace_keeper(error)
        except TooLittleMemoryError as error:
            self._give_up(error)
        except (RuntimeError, OSError) as error:
            self._give_up(f"ranks cannot agree any more ({error})")
        if self.active:
            self._disk.settled(self.committed, self._client.folder)

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
        meta = {**self._meta, **self._disk.meta}
        self._disk.capturing(step)
        try:
            begun = {shard: self._client.begin(shard, pack(parts[shard]), step, meta) for shard in self._commit.shards}
            later = begun.get(SHARED) if lazy else None
            at_once = [writing for writing in begun.values() if writing is not later]
            for writing in at_once:
                writing.copy()
            for writing in at_once:  # checksums would take the processor from copies
                writing.seal()
        except KeeperError as error:
            self._replace_keeper(error)
            return 0
        except (TooLittleMemoryError, InputError) as error:  # a value that has become one which cannot be kept
            self._give_up(error)
            return 0
        self._captured_at[step] = time.monotonic()
        self._commit.follow(step, later)
        return sum(writing.bytes for writing in begun.values())

    def wait_copied(self) -> None:
        """Return when a lazy copy is done."""
        self._commit.copied.wait()

    def end(self) -> None:
        """The run has ended and needs no going on; all ranks have settled."""
        self._disk.end()
        if self._place.is_first_of_node:
            with suppress(KeeperError):
                self._client.end()
        self.leave()

    def leave(self) -> None:
        """Go; what is in memory stays for a while, and the newest step goes to disk if its writer has been started."""
        self.active = False
        with suppress(Exception):  # whatever it is, there is no training any more to tell it
            self._commit.settle(LEAVE_S)
        self._disk.leave()
        self._client.close()

    def _connect(self) -> None:
        self._client = KeeperClient(self._job, linger_s=self._linger_s)
        shards = [own_shard(self._place.rank), *([SHARED] if self._place.local_rank == 0 else [])]
        self._commit = JobCommit(self._client, shards, self._store, self._place.ranks)
        place = self._place
        if self._store is not None and place.nodes > 1:
            first = place.local_rank == 0
            self._met = meet(self._client, self._store, place.node, place.nodes, first, place.toward)

    def _follow_partner(self) -> None:
        """Push to wherever the partner's keeper is; a partner that cannot be pushed to costs its copies alone."""
        if self._store is None or self._met.partner is None:
            return
        try:
            partner = follow(self._client, self._store, self._met.partner)
        except KeeperLostError:
            raise
        except KeeperError as error:
            log.warning("there are no more copies on host %d: %s", self._met.partner.node, error)
            partner = None
        self._met = self._met._replace(partner=partner)

    def _replace_keeper(self, error: object) -> None:
        log.warning("%s; MemoryCheckpoint goes on with a new one", error)
        self._client.close()
        try:
            self._connect()
        except (RuntimeError, OSError) as failure:  # a keeper's errors are among them
            self._give_up(failure)

    def _give_up(self, reason: object) -> None:
        log.warning("MemoryCheckpoint captures no more in this run: %s", reason)
        self.leave()

    def _fits(self, meta: Meta) -> bool:
        return all(meta.get(name) == value for name, value in self._meta.items())

    def _misfit(self, meta: Meta) -> str:
        if meta.get("world_size") != self._meta["world_size"]:
            return f"there is a state of {meta.get('world_size')} ranks, and there are {self._meta['world_size']}"
        if meta.get("layout") != self._meta.get("layout"):
            return f"there is a state of ranks in the layout {meta.get('layout')}, and this is {self._meta.get('layout')}"
        return f"there is a state of {meta.get('module')} with other parameters than this {self._meta['module']}"
