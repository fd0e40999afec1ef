"""The keeper: a process per user and node that holds captured states in its memory, whatever becomes of the trainers.

    python -m lightning_plugins.engines.resilience.keeper FOLDER

Clients start it, see ``keeper_folder``; it has a session of its own, so that nothing that ends a trainer ends it. It makes the
blocks of shared memory and passes their descriptors over a Unix socket in a private folder to processes of its own user. Nothing
has a name in a file system but that socket: when the keeper ends, the kernel takes everything back. It ends when it holds no job:
each is dropped by its clean end, or some minutes after its last client has gone.

A thread serves each client, so that one may wait for memory or checksums while others are served. It imports no torch.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_plugins.engines.resilience import slots
from lightning_plugins.engines.resilience.keeper_folder import listen, remove_files, take_lock
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.keeper_slots import Block, RefusedError, Slot
from lightning_plugins.engines.resilience.messages import (
    MESSAGE_S,
    PROTOCOL,
    MalformedError,
    close_all,
    peer_uid,
    receive,
    send,
)

if TYPE_CHECKING:
    from lightning_plugins.engines.resilience.keeper_peers import KeeperPeers

FIRST_CLIENT_S = 10.0
CLIENTS_AT_MOST = 512
_SEAL_NICENESS = 5  # checksums may wait for the trainers' arithmetic, but not the other way round

Answer = tuple[dict[str, Any], list[int]]


class Keeper:
    """Serves what ``Records`` holds.

    Args:
        listener: the listening socket.
        records: what is held.
    """

    def __init__(self, listener: socket.socket, records: Records) -> None:
        self.records = records
        self._listener = listener
        self._numbers = count(1)
        self._clients: set[int] = set()
        self._lock = threading.Lock()
        self._refused = 0
        self._peers: KeeperPeers | None = None
        self._stopping = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._seals = threading.Semaphore(max(1, min(4, (os.cpu_count() or 1) // 4)))

    def obey_signals(self) -> None:
        """Stop at SIGTERM, also at one that comes right before ``serve`` waits."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)

    def stop(self, *signal_and_frame: object) -> None:
        """Have ``serve`` return soon, whatever is held."""
        self._stopping = True
        self._wake()

    def serve(self) -> None:
        """Serve until nothing is held and nobody is connected."""
        wait_s: float | None = FIRST_CLIENT_S
        while True:
            ready, _, _ = select.select([self._listener.fileno(), self._wake_reader], [], [], wait_s)
            if self._wake_reader in ready:
                os.read(self._wake_reader, 4096)
            if self._stopping:  # before anything that may wait for another host
                return
            if self._listener.fileno() in ready:
                self._accept()
            wait_s = self.records.expire()
            if self._peers is not None:
                self._peers.close_others(list(self.records.jobs))
            with self._lock:
                if not (self._clients or self.records.jobs):
                    return

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are too many descriptors: what is held matters more
            time.sleep(0.01)
            return
        connection.settimeout(MESSAGE_S)
        reason = ""
        if peer_uid(connection) != os.geteuid():
            reason = f"this keeper serves user {os.geteuid()}, not {peer_uid(connection)}"
        elif len(self._clients) >= CLIENTS_AT_MOST:
            reason = f"this keeper serves {CLIENTS_AT_MOST} clients at most"
        if reason:
            self.count_refused()
            with suppress(OSError), connection:
                send(connection, {"error": "refused", "message": reason})
            return
        client = _Client(self, connection, next(self._numbers))
        with self._lock:
            self._clients.add(client.number)
        threading.Thread(target=self._serve_client, args=(client,), daemon=True).start()

    def _serve_client(self, client: "_Client") -> None:
        try:
            with client.connection:
                client.serve()
        except OSError:
            pass  # it has gone, or it stopped in the middle of a message
        finally:
            self.records.leave(client.number)
            with self._lock:
                self._clients.discard(client.number)
            self._wake()

    def count_refused(self) -> None:
        """Count a request that was none."""
        with self._lock:
            self._refused += 1

    def status(self) -> dict[str, Any]:
        """Return what the keeper knows of itself."""
        peers = {} if self._peers is None else self._peers.status()
        with self._lock:
            known = {"pid": os.getpid(), "clients": len(self._clients), "refused": self._refused}
        return {**known, "jobs": self.records.summary(), "steps": self.records.steps(), "peers": peers}

    def peers(self) -> "KeeperPeers":
        """Return what deals with other hosts; imported only when somebody asks, as the keeper has to start fast."""
        from lightning_plugins.engines.resilience.keeper_peers import KeeperPeers

        with self._lock:
            if self._peers is None:
                self._peers = KeeperPeers(self.records)
            return self._peers

    def committed(self, job: str) -> None:
        """Have a commit pushed to the partner, if there is one."""
        if self._peers is not None:
            self._peers.committed(job)

    def end(self, job: str) -> None:
        """Drop all that a job holds, after nobody can bring anything any more."""
        if self._peers is not None:
            self._peers.close(job)
        self.records.end(job)

    def seal(self, slot: Slot, block: Block, generation: int, data_bytes: int, draft_bytes: int) -> None:
        """Compute the checksums of a slot in a thread, and make it readable if its manifest is in order."""
        threading.Thread(target=self._seal, args=(slot, block, generation, data_bytes, draft_bytes), daemon=True).start()

    def _seal(self, slot: Slot, block: Block, generation: int, data_bytes: int, draft_bytes: int) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SEAL_NICENESS)
        sealed = None
        try:
            with self._seals:
                sealed = slots.seal_block(block.mapping, data_bytes, draft_bytes, generation)
        except (ValueError, TypeError, KeyError, RecursionError):
            self.count_refused()  # whatever stands there is no manifest
        finally:
            self.records.finish_seal(slot, generation, sealed)

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake_writer, b".")


class _Client:
    """One connection: what it asks for, in its thread."""

    def __init__(self, keeper: Keeper, connection: socket.socket, number: int) -> None:
        self.keeper, self.connection, self.number = keeper, connection, number
        self.records = keeper.records
        self.job: str | None = None
        self._after: list[Callable[[], None]] = []
        self._handlers: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "hello": self._hello,
            "reserve": self._reserve,
            "begin": self._begin,
            "seal": self._seal,
            "commit": self._commit,
            "discard": self._discard,
            "generations": self._generations,
            "open": self._open,
            "end": self._end,
            "status": self._status,
            "listen": self._listen,
            "partner": self._partner,
            "fetch": self._fetch,
            "peer_generations": self._peer_generations,
        }

    def serve(self) -> None:
        resumable = True
        while resumable:
            answer: Answer
            try:
                received = receive(self.connection, None)
                if received is None:
                    return
                request, unwanted = received
                close_all(unwanted)
                answer = self._answer(request)
            except MalformedError as error:
                self.keeper.count_refused()
                resumable = error.resumable
                answer = {"error": "malformed", "message": str(error)}, []
            except RefusedError as error:
                answer = {"error": error.kind, "message": str(error), **error.details}, []
            try:
                self._send(*answer)
            finally:  # also if the client has gone: what it has sealed counts
                while self._after:
                    self._after.pop()()  # and no name for it, which would keep the block's memory

    def _send(self, message: dict[str, Any], descriptors: list[int]) -> None:
        try:
            send(self.connection, message, descriptors)
        except ValueError as error:
            send(self.connection, {"error": "refused", "message": f"the answer is too long: {error}"})
        finally:
            close_all(descriptors)

    def _answer(self, request: dict[str, Any]) -> Answer:
        handler = self._handlers.get(str(request.get("do")))
        if handler is None:
            raise MalformedError(f"a request must do one of {', '.join(self._handlers)}", resumable=True)
        if self.job is None and handler not in (self._hello, self._status):
            raise MalformedError("the first request must be hello, with a job", resumable=True)
        try:
            return handler(request)
        except OSError as error:  # too many descriptors, say: no reason to drop what this client is writing
            raise RefusedError(f"the keeper could not do it: {error}") from error

    def _hello(self, request: dict[str, Any]) -> Answer:
        if request.get("protocol") != PROTOCOL:
            raise RefusedError(f"this keeper, process {os.getpid()}, speaks protocol {PROTOCOL}; end its jobs, or kill it")
        if self.job is not None:
            raise MalformedError("hello has been said", resumable=True)
        linger_s = request.get("linger_s")
        if not isinstance(linger_s, int | float) or not 0 <= linger_s < float("inf"):
            raise MalformedError("linger_s must be a number of seconds, 0 or more", resumable=True)
        self.job = _text(request, "job")
        self.records.join(self.number, self.job, linger_s)
        return {"pid": os.getpid()}, []

    def _reserve(self, request: dict[str, Any]) -> Answer:
        blocks = self.records.reserve(self.number, self._job, _text(request, "shard"), _count(request, "bytes"))
        return {"slots": [[index, block.number] for index, block in blocks]}, [os.dup(block.descriptor) for _, block in blocks]

    def _begin(self, request: dict[str, Any]) -> Answer:
        step, wanted_bytes = _count(request, "step"), _count(request, "bytes")
        index, generation, block = self.records.begin(self.number, self._job, _text(request, "shard"), step, wanted_bytes)
        return {"slot": index, "block": block.number, "generation": generation}, [os.dup(block.descriptor)]

    def _seal(self, request: dict[str, Any]) -> Answer:
        generation, data_bytes, draft_bytes = (_count(request, name) for name in ("generation", "data_bytes", "draft_bytes"))
        slot, block = self.records.start_seal(self.number, self._job, _text(request, "shard"), generation)
        # The trainer waits for the answer, and for nothing that its thread would have to share a core with.
        self._after.append(lambda: self.keeper.seal(slot, block, generation, data_bytes, draft_bytes))
        return {}, []

    def _commit(self, request: dict[str, Any]) -> Answer:
        self.records.commit(self._job, _text(request, "shard"), _count(request, "step"))
        job = self._job
        self._after.append(lambda: self.keeper.committed(job))
        return {}, []

    def _discard(self, request: dict[str, Any]) -> Answer:
        self.records.discard(self._job, _text(request, "shard"), _count(request, "step"))
        return {}, []

    def _generations(self, request: dict[str, Any]) -> Answer:
        shard = None if request.get("shard") is None else _text(request, "shard")
        return {"generations": self.records.generations(self._job, shard)}, []

    def _open(self, request: dict[str, Any]) -> Answer:
        generation, digest, block = self.records.open(self._job, _text(request, "shard"), _count(request, "step"))
        # A descriptor of its own that cannot be mapped for writing.
        descriptor = os.open(f"/proc/self/fd/{block.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        return {"generation": generation, "digest": digest.hex()}, [descriptor]

    def _end(self, request: dict[str, Any]) -> Answer:
        self.keeper.end(self._job)
        return {}, []

    def _status(self, request: dict[str, Any]) -> Answer:
        return self.keeper.status(), []

    def _listen(self, request: dict[str, Any]) -> Answer:
        address, port = self.keeper.peers().listen(self._job, _text(request, "address"), str(request.get("secret_mark", "")))
        return {"address": address, "port": port}, []

    def _partner(self, request: dict[str, Any]) -> Answer:
        self.keeper.peers().partner(self._job, _address(request))
        return {}, []

    def _fetch(self, request: dict[str, Any]) -> Answer:
        target = (self._job, _text(request, "shard"), _count(request, "step"))
        return {"bytes": self.keeper.peers().fetch(self.number, target, _address(request))}, []

    def _peer_generations(self, request: dict[str, Any]) -> Answer:
        return {"generations": self.keeper.peers().generations(self._job, _address(request))}, []

    @property
    def _job(self) -> str:
        assert self.job is not None
        return self.job


def _text(request: dict[str, Any], name: str) -> str:
    value = request.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise MalformedError(f"{name} must be a string of 1 to 1000 characters", resumable=True)
    return value


def _count(request: dict[str, Any], name: str) -> int:
    value = request.get(name)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise MalformedError(f"{name} must be a whole number, 0 or more", resumable=True)
    return value


def _address(request: dict[str, Any]) -> tuple[str, int]:
    port = _count(request, "port")
    if not 1 <= port <= 65535:
        raise MalformedError("port must be 1 to 65535", resumable=True)
    return _text(request, "address"), port


def main(arguments: list[str]) -> int:
    """Be the keeper of a folder: ``FOLDER [descriptor of the lock that is already held]``."""
    folder = Path(arguments[0])
    lock = int(arguments[1]) if len(arguments) > 1 else take_lock(folder)
    if lock is None:
        return 0  # there is one
    keeper = Keeper(listen(folder), Records())
    if len(arguments) > 1 and os.fork():
        # Whoever started this waits for its end, and may connect now; the keeper itself is an orphan.
        os._exit(0)
    os.set_inheritable(lock, False)
    os.chdir("/")
    keeper.obey_signals()
    # A trainer waits for the answers; threads that compute checksums shall not hold the interpreter for as long as they may.
    sys.setswitchinterval(0.0005)
    keeper.serve()
    remove_files(folder)
    # Threads may still be in the middle of a seal of what nobody can ask for any more.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
