"""What the keeper has to do with other hosts, by job: a server, a partner, and the secret that both need.

The keeper reads the secret itself, from the environment that the client which started it has passed on. Each job gets a secret
derived from it and the job's name: so the keeper of a foreign job is refused before it has said anything.
"""

import hmac
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import peer_fetch
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.keeper_slots import RefusedError
from lightning_plugins.engines.resilience.peer_push import Pusher
from lightning_plugins.engines.resilience.peer_service import LIMIT_BYTES, PeerService
from lightning_plugins.engines.resilience.peer_wire import AnswerError, PeerConnection, PeerError, PeerServer
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, VARIABLE, Secret, job_secret, secret_mark
from lightning_plugins.engines.resilience.slots import DamagedError

Address = tuple[str, int]
_Result = TypeVar("_Result")


class KeeperPeers:
    """Servers and partners of a keeper's jobs.

    Args:
        records: of the keeper.
        environ: where the secret is named; None: this process's environment.
    """

    def __init__(self, records: Records, environ: Mapping[str, str] | None = None) -> None:
        self._records, self._environ = records, environ
        self._servers: dict[str, tuple[str, str, PeerServer]] = {}  # interface, which secret, server
        self._pushers: dict[str, Pusher] = {}
        self._lock = threading.Lock()

    def listen(self, job: str, interface_address: str, expected_mark: str) -> Address:
        """Serve the job's peers on an interface, and return address and port; the same again if that is done already.

        Args:
            job: name.
            interface_address: IP address of this host.
            expected_mark: of the secret that the client has, see `secret_mark`; empty if it has none.

        Raises:
            RefusedError: without a secret, with another than the client's, or if the address cannot be bound.
        """
        secret = self._secret(job, expected_mark)
        mark = secret_mark(secret)
        with self._lock:
            known = self._servers.get(job)
            if known is not None and known[:2] == (interface_address, mark):
                return known[2].address
            try:
                handlers = PeerService(self._records, job).handlers()
                server = PeerServer((interface_address, 0), secret, handlers, LIMIT_BYTES)
            except (InputError, OSError) as error:
                raise RefusedError(f"peers cannot be served on {interface_address!r}: {error}") from error
            self._servers[job] = (interface_address, mark, server)
        if known is not None:
            known[2].close()
        return server.address

    def partner(self, job: str, address: Address) -> None:
        """Push the job's commits to a partner from now on, instead of to the one before.

        Raises:
            RefusedError: without a secret.
        """
        secret = self._secret(job)
        with self._lock:
            known = self._pushers.pop(job, None)
            if known is not None:
                known.close()
            self._pushers[job] = Pusher(self._records, job, secret, address)

    def committed(self, job: str) -> None:
        """Say that something has been committed here."""
        with self._lock:
            pusher = self._pushers.get(job)
        if pusher is not None:
            pusher.wake()

    def fetch(self, client: int, target: tuple[str, str, int], address: Address) -> int:
        """Bring a shard from a peer into this keeper, see `peer_fetch.fetch`.

        Raises:
            RefusedError: if it could not be had; its kind is ``damaged`` (with ``chunk``), ``peer``, ``memory`` or ``refused``.
        """
        try:
            return self._ask(target[0], address, lambda connection: peer_fetch.fetch(self._records, client, target, connection))
        except DamagedError as error:
            raise RefusedError(str(error), "damaged", chunk=-1 if error.chunk is None else error.chunk) from error

    def generations(self, job: str, address: Address) -> list[dict[str, Any]]:
        """Return what a peer holds.

        Raises:
            RefusedError: if it does not say; its kind is ``peer`` or ``refused``.
        """
        return self._ask(job, address, peer_fetch.peer_generations)

    def close(self, job: str) -> None:
        """Neither serve nor push a job any more."""
        with self._lock:
            pusher, served = self._pushers.pop(job, None), self._servers.pop(job, None)
        if pusher is not None:
            pusher.close()
        if served is not None:
            served[2].close()

    def close_others(self, jobs: Iterable[str]) -> None:
        """Do so, in a thread, with all jobs but those."""
        with self._lock:
            gone = (self._servers.keys() | self._pushers.keys()) - set(jobs)
        for job in gone:
            threading.Thread(target=self.close, args=(job,), daemon=True).start()

    def status(self) -> dict[str, dict[str, Any]]:
        """Return, by job, where it listens, what was refused, and how the pushes fare; see `Pusher.status`."""
        with self._lock:
            found: dict[str, dict[str, Any]] = {job: pusher.status() for job, pusher in self._pushers.items()}
            for job, (_, _, server) in self._servers.items():
                found.setdefault(job, {}).update(listening=list(server.address), refused=server.refused)
            return found

    def _ask(self, job: str, address: Address, question: Callable[[PeerConnection], _Result]) -> _Result:
        secret = self._secret(job)
        try:
            with PeerConnection.open(address, secret, peer_fetch.PEER_S) as connection:
                return question(connection)
        except (PeerError, AnswerError, InputError) as error:
            raise RefusedError(str(error), "peer") from error

    def _secret(self, job: str, expected_mark: str = "") -> Secret:
        """Return the job's, read anew each time: the file may be another start's by now."""
        try:
            secret = job_secret(self._environ)
        except InputError as error:
            raise RefusedError(str(error)) from error
        if secret is None:
            raise RefusedError(
                f"the keeper, process {os.getpid()}, was started without the job's secret, and without one nobody listens; set "
                f"{FILE_VARIABLE} or {VARIABLE} on every host, and end the keeper's jobs so that it starts anew"
            )
        if expected_mark and not hmac.compare_digest(expected_mark.encode(), secret_mark(secret).encode()):
            raise RefusedError(
                f"the keeper, process {os.getpid()}, was started with another secret than this process has, so other hosts would "
                f"refuse it; give all starts of a job the same {FILE_VARIABLE}, or end the keeper's jobs so that it starts anew"
            )
        return Secret(secret.key(b"job", job.encode()))
