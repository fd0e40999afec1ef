"""Keep a partner's copy of what is committed here: in the background, always the newest, never a queue.

What is committed while a push is under way waits; of what waits, only the newest is kept, and the rest counts as overtaken. The
trainer may take the very slot that is being pushed. Then the push ends, and the next ones go out from a snapshot of the slot,
since the wire is slower than the captures: else nothing would ever arrive.
"""

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES
from lightning_plugins.engines.resilience.keeper_incoming import chunk_place, num_chunks
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.keeper_slots import Block, OvertakenError, RefusedError, Slot, Source
from lightning_plugins.engines.resilience.peer_fetch import PEER_S, peer_generations
from lightning_plugins.engines.resilience.peer_service import be_nice, describe
from lightning_plugins.engines.resilience.peer_wire import AnswerError, PeerConnection, PeerError
from lightning_plugins.engines.resilience.secret import Secret

Address = tuple[str, int]
_log = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


@dataclass(frozen=True)
class _Safe:
    """What the partner has said that it holds."""

    generation: int
    step: int
    content: str
    written_at: float


class Pusher:
    """Pushes the commits of a job to one partner until `close`.

    Args:
        records: of this keeper.
        job: name.
        secret: of the job.
        address: of the partner's `PeerServer`.
    """

    def __init__(self, records: Records, job: str, secret: Secret, address: Address) -> None:
        self.address = address
        self._records, self._job, self._secret = records, job, secret
        self._changed = threading.Condition()
        self._wanted: dict[str, int] = {}  # by shard: generation of the last commit
        self._settled: dict[str, int] = {}  # by shard: generation that needs nothing more
        self._safe: dict[str, _Safe] = {}
        self._counts = Counter[str]()  # noted, pushed, bytes
        self._failures = Counter[str]()
        self._connection: PeerConnection | None = None
        self._snapshot: Block | None = None
        self._is_slow = self._closing = False
        self._thread = threading.Thread(target=self._run, name="peer-push", daemon=True)
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Look for new commits; returns at once."""
        newest = {shard: source.generation for shard, source in self._records.newest_own(self._job).items()}
        with self._changed:
            self._counts["noted"] += sum(self._wanted.get(shard) != generation for shard, generation in newest.items())
            self._wanted.update(newest)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread, and the connection with it, within the time of one message."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def status(self) -> dict[str, Any]:
        """Return what the partner holds of this host's shards, and what became of the rest."""
        with self._changed:
            waiting = len(self._waiting())
            steps = [self._safe[shard].step if shard in self._safe else -1 for shard in self._wanted]
            ages = [time.time() - safe.written_at for safe in self._safe.values()]
            counts = self._counts
            return {
                "partner": list(self.address),
                "safe": {shard: safe.step for shard, safe in self._safe.items()},
                "safe_step": min(steps, default=-1),
                "age_s": max(0.0, max(ages)) if -1 not in steps and ages else None,
                "pushed": counts["pushed"],
                "bytes": counts["bytes"],
                "waiting": waiting,
                "overtaken": max(0, counts["noted"] - counts["pushed"] - self._failures["refused"] - waiting),
                "failures": dict(self._failures),
            }

    def _waiting(self) -> list[str]:
        return [shard for shard, generation in self._wanted.items() if self._settled.get(shard) != generation]

    def _run(self) -> None:
        be_nice()
        pause_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause_s)
                self._changed.wait_for(lambda: self._closing or self._waiting())
                if self._closing:
                    break
                shard = self._waiting()[0]
            failure = self._try(shard)
            if failure is None:
                pause_s = 0.0
            else:
                with self._changed:
                    self._failures[failure] += 1
                pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._disconnect()

    def _try(self, shard: str) -> str | None:
        """Push the newest commit of a shard; return why another try has to wait, or None."""
        source = None
        try:
            source = self._records.newest_own(self._job).get(shard)
            if source is None:
                raise RefusedError(f"shard {shard!r} has been discarded")
            self._push(self._steady(source))
        except OvertakenError:
            self._is_slow = True
        except PeerError as error:
            self._disconnect()
            return error.reason
        except (AnswerError, RefusedError) as error:
            # It is refused again if it is sent again: the next commit may fare better.
            with self._changed:
                self._failures["refused"] += 1
                if source is None:
                    self._wanted.pop(shard, None)
                else:
                    self._settled[shard] = source.generation
            _log.warning("step %s of shard %s got no copy: %s", None if source is None else source.step, shard, error)
        except Exception:  # the thread is all that keeps copies fresh: it must go on, and say what happened
            _log.exception("a push of shard %s ended by a defect", shard)
            self._disconnect()
            return "defect"
        return None

    def _push(self, source: Source) -> None:
        connection = self._connect()
        named = {"shard": source.shard, "step": source.step}
        answer = _patiently(connection, "push_begin", {**named, **describe(source)}, source.manifest())
        if answer.get("wanted"):
            named = {"shard": source.shard, "generation": answer.get("generation")}
            for number in range(num_chunks(source.data_bytes)):
                if self._closing:
                    raise OvertakenError("another partner, or none, is wanted")
                piece = source.read(*chunk_place(number, source.data_bytes))
                connection.request("push_chunk", {**named, "chunk": number}, piece)
                with self._changed:
                    self._counts["bytes"] += len(piece)
            _patiently(connection, "push_seal", named)
            connection.request("push_commit", named)
        elif answer.get("same") is False:
            raise RefusedError(f"the partner has captured step {source.step} of shard {source.shard!r} with other values")
        with self._changed:
            self._settled[source.shard] = source.generation
            if answer.get("wanted") or answer.get("same"):
                known = self._safe.get(source.shard)
                self._counts["pushed"] += known is None or known.generation != source.generation
                self._safe[source.shard] = _Safe(source.generation, source.step, source.content.hex(), source.written_at)

    def _connect(self) -> PeerConnection:
        if self._connection is None:
            self._connection = PeerConnection.open(self.address, self._secret, PEER_S)
            # The partner may be another process by now, with nothing in it.
            held = {(one["shard"], one["step"], one["digest"]) for one in peer_generations(self._connection)}
            with self._changed:
                self._settled.clear()
                known = self._safe.items()
                self._safe = {shard: safe for shard, safe in known if (shard, safe.step, safe.content) in held}
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _steady(self, source: Source) -> Source:
        """Return the source itself, or a snapshot of it that nobody overwrites, if there is memory for one."""
        if not self._is_slow:
            return source
        try:
            if self._snapshot is None or len(self._snapshot) < source.block_bytes:
                self._snapshot = None  # first, so that its memory can be used for the next
                self._snapshot = self._records.new_block(source.block_bytes)
        except RefusedError:
            return source
        for start in range(0, source.block_bytes, CHUNK_BYTES):
            piece = source.read(start, min(CHUNK_BYTES, source.block_bytes - start))
            self._snapshot.mapping[start : start + len(piece)] = piece
        return replace(source, _slot=Slot(generation=source.generation), _block=self._snapshot)


def _patiently(connection: PeerConnection, name: str, header: dict[str, Any], data: bytes = b"") -> dict[str, Any]:
    """Ask for what may take the peer longer than a wait that would mean that it is lost."""
    answer = connection.request(name, header, data).header
    while answer.get("pending"):
        answer = connection.request("push_wait", {"shard": header["shard"]}).header
    return dict(answer)
