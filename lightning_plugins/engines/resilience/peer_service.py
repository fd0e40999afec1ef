"""What a keeper does for the keepers of other hosts that have proven the job's secret.

    list                                                 ->  JSON: shards, steps, states, digests of what is held
    find         shard, step                             ->  generation, digest, state, lengths
    manifest     shard, step, generation                 ->  its bytes
    chunk        shard, step, generation, chunk          ->  4 MiB
    push_begin   shard, step, digests; the manifest      ->  wanted, generation; or same: whether this host's own is equal
    push_chunk   shard, generation, chunk; 4 MiB
    push_seal    shard, generation                           only now the copy can be read, if all checksums are right
    push_commit  shard, generation                           only now the copy before may be overwritten
    push_wait    shard                                       what push_begin or push_seal would have answered

Pieces are the checksums' chunks, each copied from the slot and then checked for still being the same generation: so no reader
stops the trainer, who may take the slot at any time. Taking memory and computing checksums may take longer than a peer waits
for an answer before it thinks that we are lost: it gets ``pending`` then, and asks on.
"""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from contextlib import suppress
from typing import Any

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES
from lightning_plugins.engines.resilience.keeper_incoming import MOST_MANIFEST_BYTES, Incoming, chunk_place
from lightning_plugins.engines.resilience.keeper_records import COPIER, Records
from lightning_plugins.engines.resilience.keeper_slots import OvertakenError, RefusedError, Source
from lightning_plugins.engines.resilience.peer_wire import Answer, Handler
from lightning_plugins.engines.resilience.slots import DamagedError

LIMIT_BYTES = max(CHUNK_BYTES, MOST_MANIFEST_BYTES)
PENDING_S = 2.0
NICENESS = 5  # as for checksums: the trainers' arithmetic goes first
_Request = dict[str, Any]


class PeerService:
    """The handlers of one job.

    Args:
        records: of this keeper.
        job: name.
    """

    def __init__(self, records: Records, job: str) -> None:
        self._records, self._job = records, job
        self._incoming: dict[str, Incoming] = {}
        self._working: dict[str, Future[Answer]] = {}
        self._lock = threading.Lock()

    def handlers(self) -> dict[str, Handler]:
        """Return what a `PeerServer` takes."""
        methods: list[Callable[[_Request, memoryview], Answer]] = [
            self._list,
            self._find,
            self._manifest,
            self._chunk,
            self._push_begin,
            self._push_chunk,
            self._push_seal,
            self._push_commit,
            self._push_wait,
        ]
        return {method.__name__[1:]: Handler(_told_plainly(method)) for method in methods}

    def _list(self, request: _Request, data: memoryview) -> Answer:
        return Answer({}, json.dumps(self._records.generations(self._job, None)).encode())

    def _find(self, request: _Request, data: memoryview) -> Answer:
        source = self._records.source(self._job, _text(request, "shard"), _count(request, "step"))
        return Answer({**describe(source), "manifest_bytes": len(source.manifest())})

    def _manifest(self, request: _Request, data: memoryview) -> Answer:
        return Answer({}, self._source(request).manifest())

    def _chunk(self, request: _Request, data: memoryview) -> Answer:
        source = self._source(request)
        return Answer({}, source.read(*chunk_place(_count(request, "chunk"), source.data_bytes)))

    def _source(self, request: _Request) -> Source:
        source = self._records.source(self._job, _text(request, "shard"), _count(request, "step"))
        if source.generation != request.get("generation"):
            raise OvertakenError(f"step {source.step} of shard {source.shard!r} has been written anew")
        return source

    def _push_begin(self, request: _Request, data: memoryview) -> Answer:
        shard, step = _text(request, "shard"), _count(request, "step")
        held = [one for one in self._records.generations(self._job, shard) if one["step"] == step and one["digest"]]
        same = any(one["digest"] == request.get("content") for one in held)
        if self._records.is_captured_here(self._job, shard):
            return Answer({"wanted": False, "same": same if held else None})
        if any(one["digest"] == request.get("content") and one["state"] == "committed" for one in held):
            return Answer({"wanted": False, "same": True})
        written_at = request.get("written_at")
        if not isinstance(written_at, int | float):
            raise RefusedError("written_at must be a number of seconds")
        digest = bytes.fromhex(_text(request, "digest"))
        manifest = bytes(data)

        def begin() -> Answer:
            incoming = Incoming(self._records, COPIER, (self._job, shard, step), manifest, digest, float(written_at), copy=True)
            with self._lock:
                self._incoming[shard] = incoming
            return Answer({"wanted": True, "generation": incoming.generation})

        return self._start(shard, begin)

    def _push_chunk(self, request: _Request, data: memoryview) -> Answer:
        self._pushed(request).write(_count(request, "chunk"), data)
        return Answer({})

    def _push_seal(self, request: _Request, data: memoryview) -> Answer:
        shard, incoming = _text(request, "shard"), self._pushed(request)
        with self._lock:
            self._incoming.pop(shard, None)

        def seal() -> Answer:
            incoming.seal()
            return Answer({})

        return self._start(shard, seal)

    def _push_commit(self, request: _Request, data: memoryview) -> Answer:
        self._records.commit_copy(self._job, _text(request, "shard"), _count(request, "generation"))
        return Answer({})

    def _push_wait(self, request: _Request, data: memoryview) -> Answer:
        return self._wait(_text(request, "shard"))

    def _start(self, shard: str, work: Callable[[], Answer]) -> Answer:
        """Begin what may take long, in a thread."""
        future: Future[Answer] = Future()

        def run() -> None:
            be_nice()
            try:
                failpoint("resilience/peers/work")
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            self._working[shard] = future
        threading.Thread(target=run, name="peer-work", daemon=True).start()
        return self._wait(shard)

    def _wait(self, shard: str) -> Answer:
        with self._lock:
            future = self._working.get(shard)
        if future is None:
            raise RefusedError(f"nothing is pending for shard {shard!r}")
        try:
            answer = future.result(PENDING_S)
        except NotYetError:
            return Answer({"pending": True})
        return answer

    def _pushed(self, request: _Request) -> Incoming:
        shard, generation = _text(request, "shard"), _count(request, "generation")
        with self._lock:
            incoming = self._incoming.get(shard)
        if incoming is None or incoming.generation != generation:
            raise RefusedError(f"no push of shard {shard!r} with generation {generation} has begun; begin a new one")
        return incoming


def describe(source: Source) -> dict[str, Any]:
    """Return what a peer is told of a step."""
    return {
        "generation": source.generation,
        "state": source.state,
        "data_bytes": source.data_bytes,
        "digest": source.digest.hex(),
        "content": source.content.hex(),
        "written_at": source.written_at,
    }


def be_nice() -> None:
    """Have this thread, and no other, wait for the trainers' arithmetic."""
    with suppress(OSError):  # it may be nicer already, and cannot come back
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _told_plainly(method: Callable[[_Request, memoryview], Answer]) -> Callable[[_Request, memoryview], Answer]:
    """Return a handler whose refusals reach the peer as sentences, and not as defects."""

    def answer(request: _Request, data: memoryview) -> Answer:
        be_nice()
        try:
            return method(request, data)
        except (RefusedError, OvertakenError, DamagedError) as error:
            raise InputError(str(error)) from error

    return answer


def _text(request: _Request, name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise RefusedError(f"{name} must be a string of 1 to 1000 characters")
    return value


def _count(request: _Request, name: str) -> int:
    value = request.get(name)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise RefusedError(f"{name} must be a whole number, 0 or more")
    return value
