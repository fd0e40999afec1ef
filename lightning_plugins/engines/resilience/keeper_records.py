"""What the keeper holds: jobs, their shards, two slots a shard, and the rules by which a slot changes its state.

    empty -> writing -> sealed -> committed       the writer dies while it writes: empty
                ^__________|___________|          taken for writing again, but never the slot that was committed last

So there is always one committed generation that nobody writes to. "Last" is by the order of the commits, not by the step: a run
that goes on from an older step leaves newer ones behind. Memory to which somebody else may still write, another living client or
a thread with a capture that was begun and never sealed, is not used again: the slot gets new memory then, and the late writer
writes to what nobody reads.
"""

import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from lightning_plugins.engines.resilience import slots
from lightning_plugins.engines.resilience.host_memory import available_bytes
from lightning_plugins.engines.resilience.keeper_slots import (
    Block,
    Job,
    RefusedError,
    Slot,
    Source,
    free_slot,
    new_block,
    newest_of,
    with_spare,
)

COPIER = 0  # the writer of peers' copies; it writes each piece under the lock, so its memory can be used again at once
WAIT_S = 30.0  # for checksums that are being computed of the very slot that has to be written next


class Records:
    """Everything that is held; safe to use from many threads.

    Args:
        available: how many bytes may be taken, asked before memory is.
        clock: monotonic seconds.
    """

    def __init__(self, available: Callable[[], int] = available_bytes, clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs: dict[str, Job] = {}
        self._available, self._clock = available, clock
        self._living: set[int] = set()
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._allocating = threading.Lock()  # one at a time: two that look at the same free memory would both take it

    def join(self, client: int, job: str, linger_s: float) -> None:
        """Note that a client has come for a job."""
        with self._changed:
            held = self.jobs.setdefault(job, Job())
            held.clients.add(client)
            held.linger_s = linger_s
            self._living.add(client)

    def leave(self, client: int) -> None:
        """Note that a client has gone, however that happened: what it was writing is lost, what it has sealed is not."""
        with self._changed:
            self._living.discard(client)
            for name, job in list(self.jobs.items()):
                for pair in job.shards.values():
                    for slot in pair:
                        if slot.state == "writing" and slot.writer == client and not slot.sealing:
                            slot.clear()
                if client in job.clients:
                    job.clients.discard(client)
                    job.left_at = self._clock()
                    if not job.clients and not job.shards:
                        del self.jobs[name]
            self._changed.notify_all()

    def expire(self) -> float | None:
        """Drop the jobs that have been without a client for long enough; return the seconds until the next one, or None."""
        with self._changed:
            for name, job in list(self.jobs.items()):
                if not job.clients and self._clock() >= job.left_at + job.linger_s:
                    del self.jobs[name]
            waiting = [job.left_at + job.linger_s - self._clock() for job in self.jobs.values() if not job.clients]
            return min(waiting, default=None)

    def end(self, job: str) -> None:
        """Drop all that a job holds."""
        with self._changed:
            self.jobs[job].shards.clear()
            self._changed.notify_all()

    def reserve(self, client: int, job: str, shard: str, wanted_bytes: int) -> list[tuple[int, Block]]:
        """Give a shard two slots of at least that size, as far as nothing is in them; return index and memory of both.

        Raises:
            RefusedError: if there is not as much memory.
        """
        with self._allocating:
            with self._changed:
                pair = self._pair(job, shard, make=True)
                small = [slot for slot in pair if slot.state == "empty" and not slot.fits(wanted_bytes)]
                taken = [self._take(slot, client, -1) for slot in small]
            try:
                given_back = sum(len(slot.block) for slot in small if slot.block is not None)
                needed = len(small) * with_spare(wanted_bytes) - given_back
                self._check_memory(needed, f"{len(small)} slots of {wanted_bytes} bytes")
                for slot, generation in zip(small, taken, strict=True):
                    self._replace_block(slot, generation, wanted_bytes)
            finally:
                with self._changed:
                    for slot, generation in zip(small, taken, strict=True):
                        if slot.generation == generation:
                            slot.clear()
        with self._changed:
            blocks = [(index, slot.block) for index, slot in enumerate(pair) if slot.block is not None and slot.state == "empty"]
            for _, block in blocks:
                block.users.add(client)
            return blocks

    def begin(
        self, client: int, job: str, shard: str, step: int, wanted_bytes: int, copy: bool = False
    ) -> tuple[int, int, Block]:
        """Hand out a slot for writing; there is nothing whole in it any more.

        Args:
            client: who writes.
            job: name.
            shard: name.
            step: number.
            wanted_bytes: size of the slot.
            copy: whether it is what another host has captured; it gives way to whoever captures the shard here.

        Returns:
            The slot's index, the generation that is being written, and the memory.

        Raises:
            RefusedError: if memory is needed that is not there, or the other slot is being sealed for too long.
        """
        with self._changed:
            pair = self._pair(job, shard, make=True)
            # Asked anew each time: what is being sealed may be committed while this waits, and then the other slot is free.
            slot = self._changed.wait_for(lambda: free_slot(pair), WAIT_S)
            if slot is None:
                raise RefusedError(f"the checksums of the step before are not ready after {WAIT_S:g} s; capture less often")
            if copy and self._is_captured_here(pair):
                raise RefusedError(f"shard {shard!r} is captured on this host; it takes no copy of it")
            abandoned = slot.state == "writing" and slot.writer != COPIER
            generation = self._take(slot, client, step)
            slot.is_copy = copy
            if slot.block is not None:
                slot.block.users &= self._living
            foreign = slot.block is not None and (abandoned or bool(slot.block.users - {client}))
            fits = slot.fits(wanted_bytes) and not foreign
        try:
            if not fits:
                with self._allocating:
                    given_back = 0 if slot.block is None or foreign else len(slot.block)
                    self._check_memory(with_spare(wanted_bytes) - given_back, f"a slot of {wanted_bytes} bytes")
                    self._replace_block(slot, generation, wanted_bytes, populate=not copy)
            with self._changed:
                if slot.generation != generation or slot.block is None:
                    raise RefusedError(f"another client has begun to write shard {shard!r}; only one may write a shard")
                slot.block.users.add(client)
                return pair.index(slot), generation, slot.block
        except BaseException:
            with self._changed:
                if slot.generation == generation:
                    slot.clear()
            raise

    def start_seal(self, client: int, job: str, shard: str, generation: int) -> tuple[Slot, Block]:
        """Take a slot back from its writer; ``finish_seal`` has to follow.

        Raises:
            RefusedError: if it is not this client's to give.
        """
        with self._changed:
            for slot in self._pair(job, shard):
                mine = slot.writer == client and slot.state == "writing" and not slot.sealing
                if mine and slot.generation == generation and slot.block is not None:
                    slot.sealing = True
                    return slot, slot.block
        raise RefusedError(f"shard {shard!r} has no generation {generation} that this client writes; begin a new one")

    def write(self, target: tuple[str, str, int], offset: int, data: bytes | memoryview) -> None:
        """Write a piece of a peer's copy into the slot that ``begin`` gave out for it.

        Args:
            target: job, shard and generation.
            offset: from the block's start, in bytes.
            data: the piece.

        Raises:
            RefusedError: if the slot has been taken for something else.
        """
        job, shard, generation = target
        with self._changed:
            for slot in self._pair(job, shard):
                if slot.generation == generation and slot.state == "writing" and not slot.sealing and slot.block is not None:
                    slot.block.mapping[offset : offset + len(data)] = data
                    return
        raise RefusedError(f"shard {shard!r} has no generation {generation} that is being copied; begin a new one")

    def finish_seal(
        self, slot: Slot, generation: int, sealed: tuple[dict[str, Any], bytes] | None, written_at: float | None = None
    ) -> None:
        """Make a slot readable, or empty if ``sealed``, manifest and digest, is None.

        Args:
            slot: that is being sealed.
            generation: that is being sealed.
            sealed: manifest and digest.
            written_at: seconds since 1970; None is now.
        """
        content = b"" if sealed is None else slots.content_digest(sealed[0])
        with self._changed:
            if slot.generation == generation and slot.sealing:
                slot.sealing = False
                if sealed is None:
                    slot.clear()
                else:
                    manifest, slot.digest = sealed
                    slot.state, slot.meta, slot.data_bytes = "sealed", manifest["meta"], manifest["data_bytes"]
                    slot.content = content
                    slot.written_at = time.time() if written_at is None else written_at
            self._changed.notify_all()

    def commit(self, job: str, shard: str, step: int) -> None:
        """Mark a step as one that all ranks have: in this shard, and in all others of the job where it is sealed.

        Raises:
            RefusedError: if this shard has not sealed it.
        """
        with self._changed:
            self._whole(job, shard, step)
            for pair in self._shards(job).values():
                slot = newest_of(pair, step)
                if slot is not None and slot.state == "sealed" and not slot.is_copy:
                    slot.state, slot.commit_number = "committed", next(self._numbers)

    def commit_copy(self, job: str, shard: str, generation: int) -> None:
        """Mark one sealed generation as committed; copies of later steps belong to a past that the run has given up.

        Raises:
            RefusedError: if it is not there.
        """
        with self._changed:
            pair = self._pair(job, shard)
            found = [slot for slot in pair if slot.generation == generation and slot.is_whole]
            if not found:
                raise RefusedError(f"shard {shard!r} holds no whole generation {generation}; begin a new one")
            found[0].state, found[0].commit_number = "committed", next(self._numbers)
            for slot in pair:
                if slot.is_copy and slot.is_whole and slot.step > found[0].step:
                    slot.clear()

    def discard(self, job: str, shard: str, step: int) -> None:
        """Empty the slots of a shard that hold a step, because it is damaged or belongs to a past that was given up."""
        with self._changed:
            for slot in self._pair(job, shard):
                if slot.step == step and slot.is_whole:
                    slot.clear()

    def open(self, job: str, shard: str, step: int) -> tuple[int, bytes, Block]:
        """Return generation, digest and memory of a whole step.

        Raises:
            RefusedError: if there is none.
        """
        with self._changed:
            slot = self._whole(job, shard, step)
            assert slot.block is not None
            return slot.generation, slot.digest, slot.block

    def source(self, job: str, shard: str, step: int) -> Source:
        """Return a whole step to be read piece by piece.

        Raises:
            RefusedError: if there is none.
        """
        with self._changed:
            return Source.of(shard, self._whole(job, shard, step))

    def newest_own(self, job: str) -> dict[str, Source]:
        """Return the last commit of each shard that was captured on this host."""
        with self._changed:
            last = {shard: max(pair, key=lambda slot: slot.commit_number) for shard, pair in self._shards(job).items()}
            return {shard: Source.of(shard, slot) for shard, slot in last.items() if slot.commit_number and not slot.is_copy}

    def is_captured_here(self, job: str, shard: str) -> bool:
        """Say whether a living client of this host writes a shard."""
        with self._changed:
            return self._is_captured_here(self._pair(job, shard))

    def new_block(self, wanted_bytes: int) -> Block:
        """Return memory that belongs to no slot, made while trainers go on asking.

        Raises:
            RefusedError: if it is not there.
        """
        with self._allocating:
            self._check_memory(wanted_bytes, f"a block of {wanted_bytes} bytes")
            return new_block(wanted_bytes, self._available, populate=False)

    def generations(self, job: str, shard: str | None) -> list[dict[str, Any]]:
        """Describe the slots that are not empty, of one shard or of all."""
        with self._changed:
            return [
                {
                    "shard": name,
                    "step": slot.step,
                    "state": slot.state,
                    "generation": slot.generation,
                    "bytes": slot.data_bytes if slot.is_whole else 0,
                    "meta": slot.meta if slot.is_whole else {},
                    "written_at": slot.written_at if slot.is_whole else 0.0,
                    "is_copy": slot.is_copy,
                    "digest": slot.content.hex() if slot.is_whole else "",
                }
                for name, pair in self._shards(job).items()
                for slot in pair
                if slot.state != "empty" and slot.step >= 0 and shard in (None, name)
            ]

    def summary(self) -> dict[str, int]:
        """Return the bytes held, by job."""
        with self._changed:
            return {
                name: sum(len(slot.block) for pair in job.shards.values() for slot in pair if slot.block is not None)
                for name, job in self.jobs.items()
            }

    def steps(self) -> dict[str, list[tuple[int, int, bool, float]]]:
        """Return the whole steps of each job, newest first: number, how many shards, whether all are committed, when written."""
        with self._changed:
            return {name: sorted(_steps_of(job), reverse=True) for name, job in self.jobs.items()}

    def _shards(self, job: str) -> dict[str, tuple[Slot, Slot]]:
        if job not in self.jobs:
            raise RefusedError(f"job {job!r} is not held here any more")  # a peer may still ask for it
        return self.jobs[job].shards

    def _is_captured_here(self, pair: tuple[Slot, Slot]) -> bool:
        return any(slot.block is not None and slot.block.users & self._living for slot in pair)

    def _pair(self, job: str, shard: str, make: bool = False) -> tuple[Slot, Slot]:
        shards = self._shards(job)
        return shards.setdefault(shard, (Slot(), Slot())) if make else shards.get(shard, (Slot(), Slot()))

    def _whole(self, job: str, shard: str, step: int) -> Slot:
        pair = self._pair(job, shard)
        slot = newest_of(pair, step)
        if slot is None:
            held = ", ".join(f"{slot.step} ({slot.state})" for slot in pair if slot.is_whole) or "no step at all"
            raise RefusedError(f"shard {shard!r} holds no whole step {step}; it holds {held}")
        return slot

    def _take(self, slot: Slot, client: int, step: int) -> int:
        slot.clear()
        slot.state, slot.step, slot.writer, slot.generation = "writing", step, client, next(self._numbers)
        return slot.generation

    def _replace_block(self, slot: Slot, generation: int, wanted_bytes: int, populate: bool = True) -> None:
        with self._changed:
            if slot.generation == generation:
                slot.block = None  # first, so that its memory can be used for the next
        block = new_block(with_spare(wanted_bytes), self._available, populate)
        with self._changed:
            if slot.generation == generation:
                slot.block = block

    def _check_memory(self, needed_bytes: int, purpose: str) -> None:
        available = self._available()
        if needed_bytes > available:
            raise RefusedError(
                f"{purpose} need {needed_bytes} bytes more, and {available} are available",
                "memory",
                needed_bytes=needed_bytes,
                available_bytes=available,
            )


def _steps_of(job: Job) -> Iterator[tuple[int, int, bool, float]]:
    whole = [slot for pair in job.shards.values() for slot in pair if slot.is_whole]
    for step in {slot.step for slot in whole}:
        slots = [slot for slot in whole if slot.step == step]
        is_committed = all(slot.state == "committed" for slot in slots)
        yield step, len(slots), is_committed, max(slot.written_at for slot in slots)
