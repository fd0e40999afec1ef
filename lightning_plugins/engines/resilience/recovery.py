"""The ladder of recovery: the newest step that every rank can obtain whole, from wherever each of them can.

A rank looks into this host's memory first, then onto the disk. Ranks name the steps that they have anywhere; from the newest that
all have named downwards each tries its sources in turn, and a step is taken when all ranks have loaded it. So one damaged copy
costs that copy, and all copies of a step damaged cost one step.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from lightning_plugins.engines.resilience import disk_folder
from lightning_plugins.engines.resilience.agreement import common_steps, everywhere
from lightning_plugins.engines.resilience.disk import read_step
from lightning_plugins.engines.resilience.disk_steps import step_folder, steps
from lightning_plugins.engines.resilience.keeper_client import Generation, KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.shards import SHARED, join, own_shard
from lightning_plugins.engines.resilience.slots import DamagedError

log = logging.getLogger(__name__)

Meta = dict[str, Any]


class Source(Protocol):
    """Somewhere a rank's states are.

    Attributes:
        name: for the log.
    """

    name: str

    def metas(self) -> dict[int, Meta]:
        """Return the steps that are there as far as can be seen without reading them, and what came with each."""
        ...

    def load(self, step: int) -> dict[str, Any]:
        """Return a state.

        Raises:
            DamagedError: if it is not what was captured.
            KeeperError: if it is not there any more.
            OSError: if it cannot be read.
        """
        ...


class Memory:
    """This host's keeper.

    Args:
        client: of this rank.
        rank: whose states are looked for.
    """

    name = "the memory of this host"

    def __init__(self, client: KeeperClient, rank: int) -> None:
        self._client, self._shards = client, (SHARED, own_shard(rank))

    def metas(self) -> dict[int, Meta]:
        """See ``Source``."""
        held: dict[str, dict[int, Meta]] = {shard: {} for shard in self._shards}
        for one in self._client.generations():
            if one.shard in held and one.state != "writing":
                held[one.shard][one.step] = one.meta
        shared, own = (held[shard] for shard in self._shards)
        return {step: own[step] for step in own if shared.get(step) == own[step]}

    def load(self, step: int) -> dict[str, Any]:
        """See ``Source``."""
        return join(*(self._client.load(shard, step)[0] for shard in self._shards))


class Neighbours:
    """The keepers of other hosts; what they hold comes into this host's keeper first.

    Args:
        client: of this rank.
        addresses: of their keepers.
        rank: whose states are looked for.
    """

    name = "the memory of another host"

    def __init__(self, client: KeeperClient, addresses: Sequence[tuple[str, int]], rank: int) -> None:
        self._client, self._addresses, self._shards = client, addresses, (SHARED, own_shard(rank))
        self._places: dict[tuple[str, int], list[tuple[str, int] | None]] = {}  # of each shard and step; None is this host

    def metas(self) -> dict[int, Meta]:
        """See ``Source``."""
        metas: dict[tuple[str, int], Meta] = {}
        for address in (None, *self._addresses):
            for one in self._held_at(address):
                if one.shard in self._shards and one.state != "writing":
                    metas[one.shard, one.step] = one.meta
                    self._places.setdefault((one.shard, one.step), []).append(address)
        shared, own = self._shards
        return {step: meta for (shard, step), meta in metas.items() if shard == own and metas.get((shared, step)) == meta}

    def load(self, step: int) -> dict[str, Any]:
        """See ``Source``."""
        return join(*(self._load(shard, step) for shard in self._shards))

    def _held_at(self, address: tuple[str, int] | None) -> list[Generation]:
        try:
            return self._client.generations() if address is None else self._client.peer_generations(*address)
        except KeeperError as error:
            log.warning("a keeper cannot be asked: %s", error)
            return []

    def _load(self, shard: str, step: int) -> dict[str, Any]:
        failure: Exception | None = None
        for address in self._places[shard, step]:
            try:
                if address is not None:
                    self._client.fetch(shard, step, *address)
                state: dict[str, Any] = self._client.load(shard, step)[0]
                return state
            except (DamagedError, KeeperError) as error:
                failure = error
        assert failure is not None
        raise failure


class Disk:
    """A folder of steps; empty for us if its run has ended cleanly.

    Args:
        disk_dir: the folder.
        owner: name of the job in it.
        rank: whose states are looked for.
    """

    def __init__(self, disk_dir: Path, owner: str, rank: int) -> None:
        self.name = f"disk, {disk_dir}"
        self._disk_dir, self._owner, self._shards = disk_dir, owner, (SHARED, own_shard(rank))

    def metas(self) -> dict[int, Meta]:
        """See ``Source``."""
        try:
            record = disk_folder.read_run(self._disk_dir) or {}
        except OSError as error:
            log.warning("steps on disk cannot be looked for: %s", error)
            return {}
        if record.get("job") != self._owner or record.get("ended"):
            return {}
        return {one.step: one.meta for one in steps(self._disk_dir, thorough=False) if not one.damage}

    def load(self, step: int) -> dict[str, Any]:
        """See ``Source``."""
        return join(*(read_step(step_folder(self._disk_dir, step), shard) for shard in self._shards))


class Found(NamedTuple):
    """What the ranks go on from.

    Attributes:
        step: its number.
        state: of this rank.
        source: where this rank had it from.
    """

    step: int
    state: dict[str, Any]
    source: str


def find(sources: Sequence[Source], fits: Callable[[Meta], bool], group: dist.ProcessGroup | None = None) -> Found | None:
    """Return the newest state that all ranks can obtain whole, or None; to be called on every rank.

    Args:
        sources: of this rank, the quickest first.
        fits: whether a state with this meta may be gone on from.
        group: the ranks; None is the default group, or this process alone.
    """
    having = [(source, {step for step, meta in source.metas().items() if fits(meta)}) for source in sources]
    for step in common_steps(sorted(set().union(*(held for _, held in having))), group):
        found = None
        for source, held in having:
            if step in held and found is None:
                found = _loaded(source, step)
        if everywhere(found is not None, group):
            return found
    return None


def _loaded(source: Source, step: int) -> Found | None:
    try:
        return Found(step, source.load(step), source.name)
    except (DamagedError, KeeperError, OSError) as error:
        log.warning("step %d from %s cannot be used: %s", step, source.name, error)
        return None
