"""The parts of what the keeper holds: blocks of memory, slots in them, jobs; and why a request is refused."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from mmap import mmap
from typing import Any

from lightning_plugins.engines.resilience import slots

_SPARE_BYTES = 64 << 10


class RefusedError(Exception):
    """A request that cannot be granted; the rest of what the keeper holds is as it was.

    Attributes:
        kind: ``refused`` or ``memory``.
        details: numbers that belong to it.
    """

    def __init__(self, reason: str, kind: str = "refused", **details: int) -> None:
        super().__init__(reason)
        self.kind, self.details = kind, details


class OvertakenError(Exception):
    """What was being read is being written anew."""


class Block:
    """A block of memory, the keeper's own descriptor and mapping of it."""

    _numbers = count(1)

    def __init__(self, capacity_bytes: int, available: Callable[[], int], populate: bool = True) -> None:
        self.descriptor = slots.make_block(capacity_bytes, available)
        self.mapping: mmap = slots.map_block(self.descriptor, writable=True, populate=populate)
        self.number = next(self._numbers)
        self.users: set[int] = set()  # clients that got it for writing

    def __len__(self) -> int:
        return len(self.mapping)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(eq=False)
class Slot:
    """One of two slots of a shard."""

    block: Block | None = None
    state: str = "empty"
    step: int = -1
    generation: int = 0
    writer: int = 0
    sealing: bool = False
    commit_number: int = 0
    data_bytes: int = 0
    digest: bytes = b""
    content: bytes = b""
    meta: dict[str, Any] = field(default_factory=dict)
    written_at: float = 0.0
    is_copy: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it can be read."""
        return self.state in ("sealed", "committed")

    def fits(self, wanted_bytes: int) -> bool:
        """Whether it has as much memory."""
        return self.block is not None and len(self.block) >= wanted_bytes

    def clear(self) -> None:
        """Forget what is in it; the memory stays."""
        if self.block is not None:
            slots.invalidate(self.block.mapping)
        self.state, self.step, self.generation, self.writer, self.sealing, self.commit_number = "empty", -1, 0, 0, False, 0
        self.is_copy = False


@dataclass(frozen=True)
class Source:
    """A whole generation to be read piece by piece, while its slot may be taken for the next one.

    Attributes:
        shard: name.
        step: number.
        generation: that the slot has as long as the pieces are good.
        state: ``sealed`` or ``committed``, when it was found.
        data_bytes: length of the data.
        digest: of the manifest.
        content: see ``slots.content_digest``.
        written_at: seconds since 1970.
    """

    shard: str
    step: int
    generation: int
    state: str
    data_bytes: int
    digest: bytes
    content: bytes
    written_at: float
    _slot: Slot = field(repr=False)
    _block: Block = field(repr=False)

    @classmethod
    def of(cls, shard: str, slot: Slot) -> "Source":
        """Return the source of a whole slot; to be called where no slot can change."""
        assert slot.block is not None
        numbers = (slot.step, slot.generation, slot.state, slot.data_bytes, slot.digest, slot.content, slot.written_at)
        return cls(shard, *numbers, slot, slot.block)

    @property
    def block_bytes(self) -> int:
        """How long the block is."""
        return len(self._block)

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of some bytes of the block.

        Raises:
            OvertakenError: if they may already be another generation's.
        """
        copied = self._block.mapping[offset : offset + length]
        # A writer gets the block only after the slot has another generation: what was copied before is good.
        if self._slot.generation != self.generation:
            raise OvertakenError(f"step {self.step} of shard {self.shard!r} is being overwritten")
        return copied

    def manifest(self) -> bytes:
        """Return the manifest as it stands in the block.

        Raises:
            OvertakenError: as for ``read``.
        """
        encoded = slots.stored_manifest(self._block.mapping)
        self.read(0, 0)
        return encoded


@dataclass
class Job:
    """A job's shards, its connected clients, and how long it outlives them."""

    shards: dict[str, tuple[Slot, Slot]] = field(default_factory=dict)
    clients: set[int] = field(default_factory=set)
    linger_s: float = 0.0
    left_at: float = 0.0


def free_slot(pair: tuple[Slot, Slot]) -> Slot | None:
    """Return the slot to be written next, the emptiest, then the oldest; None if it is just being sealed."""
    last = max(pair, key=lambda slot: slot.commit_number)
    free = [slot for slot in pair if not slot.sealing and not (slot is last and slot.commit_number)]
    return min(free, key=lambda slot: (slot.state != "empty", slot.generation), default=None)


def newest_of(pair: tuple[Slot, Slot], step: int) -> Slot | None:
    """Return the whole slot of a step, the later one if both hold it."""
    whole = [slot for slot in pair if slot.is_whole and slot.step == step]
    return max(whole, key=lambda slot: slot.generation, default=None)


def with_spare(wanted_bytes: int) -> int:
    """Return what is taken where as much is wanted: a longer manifest must not cost a new block."""
    return wanted_bytes + wanted_bytes // 64 + _SPARE_BYTES


def new_block(wanted_bytes: int, available: Callable[[], int], populate: bool = True) -> Block:
    """Return new memory; ``populate`` as for ``slots.map_block``.

    Raises:
        RefusedError: if it is not there.
    """
    try:
        return Block(wanted_bytes, available, populate)
    except (OSError, OverflowError) as error:
        reason, left = f"{wanted_bytes} bytes of memory could not be had: {error}", available()
        raise RefusedError(reason, "memory", needed_bytes=wanted_bytes, available_bytes=left) from None
