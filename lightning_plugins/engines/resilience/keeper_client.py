"""The trainer's side of the keeper: capture states into its memory, and get them back.

    client = KeeperClient("my-run")
    client.capture("rank0", pack(state), step=10, meta={})     # blocks for one copy from memory to memory
    client.wait_sealed("rank0", 10)                            # the keeper has computed the checksums
    client.commit("rank0", 10)                                 # once all ranks are that far
    state, meta = client.load("rank0", 10)

``begin`` gives the halves of ``capture`` apart: the copy may then go on in another thread.
"""

import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience import slot_tensors, slots
from lightning_plugins.engines.resilience.keeper_folder import (
    KeeperError,
    KeeperLostError,
    connect,
    connect_or_start,
    private_folder,
)
from lightning_plugins.engines.resilience.keeper_values import Captured as Captured
from lightning_plugins.engines.resilience.keeper_values import Generation as Generation
from lightning_plugins.engines.resilience.keeper_values import NoCopyError as NoCopyError
from lightning_plugins.engines.resilience.keeper_values import TooLittleMemoryError as TooLittleMemoryError
from lightning_plugins.engines.resilience.messages import PROTOCOL, MalformedError, close_all, receive, send
from lightning_plugins.engines.resilience.secret import job_secret, secret_mark
from lightning_plugins.engines.resilience.slots import DamagedError
from lightning_plugins.engines.resilience.state_tree import Packed, unpack

_ANSWER_S = 60.0  # the keeper may have to wait for checksums
_BYTES_PER_S_AT_LEAST = 50e6  # of making memory
_LONGEST_POLL_S = 0.02
_FETCH_S = 3600.0  # the keeper gives up on a silent peer by itself


class Writing:
    """A capture that has begun; the keeper drops it if the client ends before ``seal``.

    Attributes:
        bytes: of data.
        generation: its number.
    """

    def __init__(
        self, client: "KeeperClient", shard: str, packed: Packed, layout: slot_tensors.Layout, block: mmap, generation: int
    ) -> None:
        self.bytes, self.generation = layout.data_bytes, generation
        self._client, self._shard, self._packed, self._layout, self._block = client, shard, packed, layout, block
        self._views = client._views_into(block, packed, layout)
        self._missing = set(range(len(packed.tensors)))

    def copy(self, numbers: Iterable[int] | None = None) -> None:
        """Copy tensors into the slot; returns when they are there.

        Args:
            numbers: which of the packed tensors; None is all that have not been copied.
        """
        failpoint("resilience/capture/copy")
        chosen = sorted(self._missing) if numbers is None else list(numbers)
        for number in chosen:
            failpoint("resilience/capture/tensor")
            slot_tensors.copy_into(self._views, self._packed.tensors, [number])
        slot_tensors.finish_copies([self._packed.tensors[number] for number in chosen])
        self._missing.difference_update(chosen)

    def seal(self) -> None:
        """Hand the slot over to the keeper, which computes the checksums; see ``KeeperClient.wait_sealed``.

        Raises:
            RuntimeError: if tensors have not been copied.
        """
        if self._missing:
            raise RuntimeError(f"{len(self._missing)} tensors of shard {self._shard!r} have not been copied; copy() them first")
        slot_tensors.write_rest(self._block, self._packed, self._layout)
        failpoint("resilience/capture/seal")
        lengths = {"data_bytes": self.bytes, "draft_bytes": len(self._layout.draft)}
        self._client._ask("seal", shard=self._shard, generation=self.generation, **lengths)


class KeeperClient:
    """A connection to this node's keeper, which is started if there is none. It may be used from several threads.

    Args:
        job: name under which shards are kept; clients of one job see the same shards.
        linger_s: how long the job's memory outlives its last client, unless ``end`` is called.
        folder: where the keeper's socket is; None is the user's own, see ``private_folder``.
        start: whether to start a keeper where there is none.

    Raises:
        InputError: on a system other than Linux, for a folder that is not private, or for bad values.
        KeeperLostError: if there is no keeper and none is to be started.
        KeeperError: if a keeper can neither be found nor started.
    """

    def __init__(self, job: str, *, linger_s: float = 300.0, folder: str | Path | None = None, start: bool = True) -> None:
        if not hasattr(os, "memfd_create"):
            raise InputError(f"captures in memory need Linux, this is {sys.platform}; capture to disk instead")
        if not job or not 0 <= linger_s < float("inf"):
            raise InputError(f"job must be a name and linger_s 0 or more, got {job!r} and {linger_s}; 300 outlives a restart")
        self.job = job
        self.folder = private_folder(folder)
        self._lock = threading.Lock()
        self._blocks: dict[tuple[str, int], tuple[int, mmap]] = {}  # by shard and slot: the block's number, its memory
        self._views: dict[int, tuple[Any, list[Tensor]]] = {}  # by the block's address: the layout they were made for
        self._written: dict[str, dict[int, int]] = {}  # by shard: generations of the last steps that this client has begun
        self._connection: socket.socket | None = None
        self.keeper_pid = self._join(linger_s, connect_or_start if start else connect)
        _clients.add(self)

    def __enter__(self) -> "KeeperClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def reserve(self, shard: str, bytes: int) -> None:
        """Have two slots made for a shard, all of their pages present, so that the first captures are as fast as later ones.

        Args:
            shard: name.
            bytes: size of a slot; ``block_bytes`` says how much a state takes.

        Raises:
            TooLittleMemoryError: if they would take more than the host can give; nothing is taken then.
        """
        answer, descriptors = self._ask("reserve", shard=shard, bytes=bytes, wait_s=_ANSWER_S + 2 * bytes / _BYTES_PER_S_AT_LEAST)
        for (slot, number), descriptor in zip(answer["slots"], descriptors, strict=True):
            self._map(shard, slot, number, descriptor)

    def begin(self, shard: str, packed: Packed, step: int, meta: dict[str, Any]) -> Writing:
        """Take a slot for writing; ``copy`` and ``seal`` what comes back, from any thread.

        Args:
            shard: name; only one client may write it.
            packed: the state; its tensors must not change before they have been copied.
            step: number, 0 or more.
            meta: plain values that travel with it.

        Raises:
            TooLittleMemoryError: if a larger slot is needed than the host has memory for.
            InputError: if ``meta`` holds what JSON does not.
            KeeperError: if the checksums of the step before take too long.
        """
        layout = slot_tensors.plan(packed, step, meta)
        size = layout.block_bytes
        answer, descriptors = self._ask(
            "begin", shard=shard, step=step, bytes=size, wait_s=_ANSWER_S + size / _BYTES_PER_S_AT_LEAST
        )
        block = self._map(shard, answer["slot"], answer["block"], descriptors[0])
        written = self._written.setdefault(shard, {})
        written.pop(step, None)
        written[step] = answer["generation"]
        while len(written) > 2:
            del written[next(iter(written))]
        return Writing(self, shard, packed, layout, block, answer["generation"])

    def capture(self, shard: str, packed: Packed, step: int, meta: dict[str, Any]) -> Captured:
        """Copy a state into the keeper's memory; arguments and errors as for ``begin``.

        Returns:
            Bytes and seconds. Checksums are computed behind it: see ``wait_sealed``.
        """
        start_s = time.perf_counter()
        writing = self.begin(shard, packed, step, meta)
        writing.copy()
        writing.seal()
        return Captured(writing.bytes, time.perf_counter() - start_s)

    def wait_sealed(self, shard: str, step: int, timeout_s: float) -> None:
        """Wait until a captured step is whole and has its checksums.

        Raises:
            TimeoutError: after ``timeout_s``.
            KeeperError: if the step is not there, or not any more.
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.001
        while True:
            answer, _ = self._ask("generations", shard=shard)
            generation = self._written.get(shard, {}).get(step)
            found = [one for one in answer["generations"] if one["step"] == step and generation in (None, one["generation"])]
            if not found:
                raise KeeperError(f"step {step} of shard {shard!r} is not in the keeper's memory; capture it again")
            if found[0]["state"] != "writing":
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {step} of shard {shard!r} was not sealed within {timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def commit(self, shard: str, step: int) -> None:
        """Mark a step as complete on all ranks: its slot is not written to before another step has been committed.

        Call it when all ranks have sealed the step. It counts for all shards of the job in this keeper that have sealed it.

        Raises:
            KeeperError: if this shard has not sealed it.
        """
        failpoint("resilience/capture/commit")
        self._ask("commit", shard=shard, step=step)
        failpoint("resilience/capture/committed")

    def discard(self, shard: str, step: int) -> None:
        """Drop a step, committed or not: because it is damaged, or the run goes on from an older one."""
        self._ask("discard", shard=shard, step=step)

    def generations(self, shard: str | None = None) -> list[Generation]:
        """Return what the job's slots hold, of one shard or of all."""
        answer, _ = self._ask("generations", shard=shard)
        return [Generation(**{name: entry[name] for name in Generation._fields}) for entry in answer["generations"]]

    def load(self, shard: str, step: int) -> tuple[Any, dict[str, Any]]:
        """Return the state of a step and its meta; the tensors are copies in this process's memory.

        Raises:
            DamagedError: if a checksum differs; it names shard, step and chunk.
            KeeperError: if the step is not there, or was overwritten while it was read.
        """
        answer, descriptors = self._ask("open", shard=shard, step=step)
        try:
            block = slots.map_block(descriptors[0], writable=False)
        finally:
            close_all(descriptors)
        generation = answer["generation"]
        try:
            manifest = slots.check_block(memoryview(block), shard, step, generation, bytes.fromhex(answer["digest"]))
            packed = slot_tensors.read_packed(block, manifest)
        except DamagedError:
            self._check_still_there(shard, step, generation)
            raise
        self._check_still_there(shard, step, generation)
        return unpack(*packed), manifest["meta"]

    def listen(self, interface_address: str) -> tuple[str, int]:
        """Have the keeper serve the keepers of the job's other hosts, if they prove the job's secret.

        Args:
            interface_address: IP address of this host on the process group's network.

        Returns:
            Address and port, to be told to the other hosts; the same again if it is asked again.

        Raises:
            KeeperError: if the keeper finds no secret in the environment that it was started with, or another one than this
                process does, or cannot bind the address.
            InputError: if this process's secret cannot be read.
        """
        secret = job_secret()
        answer, _ = self._ask("listen", address=interface_address, secret_mark="" if secret is None else secret_mark(secret))
        return str(answer["address"]), int(answer["port"])

    def partner(self, address: str, port: int) -> None:
        """Have each commit of this host's shards pushed to another host's keeper, in the background, from now on.

        Args:
            address: what ``listen`` returned there.
            port: likewise.

        Raises:
            KeeperError: if the keeper finds no secret.
        """
        self._ask("partner", address=address, port=port)

    def peer_generations(self, address: str, port: int) -> list[Generation]:
        """Return what another host's keeper holds of this job.

        Raises:
            NoCopyError: if it cannot be reached, or refuses.
        """
        answer, _ = self._ask("peer_generations", address=address, port=port)
        return [Generation(**{name: entry[name] for name in Generation._fields}) for entry in answer["generations"]]

    def fetch(self, shard: str, step: int, address: str, port: int) -> int:
        """Bring a step from another host's keeper into this one, every checksum compared, for ``load`` to find.

        It is committed here if it is there, and takes the slot of the two that was not committed last.

        Returns:
            The bytes of data.

        Raises:
            NoCopyError: if the other keeper cannot be reached, refuses, or does not hold the step.
            DamagedError: if it holds something else than was captured.
            TooLittleMemoryError: if this host has no memory for it.
        """
        answer, _ = self._ask("fetch", shard=shard, step=step, address=address, port=port, wait_s=_FETCH_S)
        return int(answer["bytes"])

    def peer_status(self) -> dict[str, Any]:
        """Return how the job's copies on other hosts fare; empty before ``listen`` and ``partner``.

        Returns:
            ``listening``: address and port; ``refused``: messages that were dropped, by reason; ``partner``: its address and
            port; ``safe``: newest step that the partner holds, by shard; ``safe_step``: that it holds of all, -1 if of none;
            ``age_s``: seconds since that was captured; ``pushed``, ``waiting``, ``overtaken``: commits of shards; ``bytes``:
            sent; ``failures``: by reason, ``lost`` for the network's and ``refused`` for the partner's.
        """
        found: dict[str, Any] = self.status()["peers"].get(self.job, {})
        return found

    def status(self) -> dict[str, Any]:
        """Return the keeper's ``pid``, numbers of ``clients`` and ``refused`` requests, the bytes of ``jobs``, and ``peers``."""
        answer, _ = self._ask("status")
        return answer

    def end(self) -> None:
        """End the job cleanly: its memory is given back, and with the last client of the last job the keeper ends."""
        self._ask("end")
        self._forget_blocks()

    def close(self) -> None:
        """Leave; what was committed stays for ``linger_s``."""
        self._forget_blocks()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _join(self, linger_s: float, reach: Callable[[Path], socket.socket | None]) -> int:
        """Say hello; a keeper that is just ending does not answer, and may have a successor soon."""
        deadline = time.monotonic() + _ANSWER_S
        while True:
            if (connection := reach(self.folder)) is None:
                raise KeeperLostError(f"there is no keeper in {self.folder}; a KeeperClient with start=True starts one")
            self._connection = connection
            try:
                answer, _ = self._ask("hello", job=self.job, linger_s=linger_s, protocol=PROTOCOL)
                return int(answer["pid"])
            except KeeperLostError:
                if time.monotonic() > deadline:
                    raise
            except BaseException:
                self.close()
                raise

    def _ask(self, do: str, wait_s: float = _ANSWER_S, **fields: Any) -> tuple[dict[str, Any], Sequence[int]]:
        with self._lock:
            if self._connection is None:
                raise KeeperLostError(f"the connection of job {self.job!r} to its keeper is closed; make a new KeeperClient")
            try:
                self._connection.settimeout(wait_s)
                send(self._connection, {"do": do, **fields})
                received = receive(self._connection, wait_s)
            except (OSError, MalformedError) as error:
                self._lose(f"does not answer ({error})")
            if received is None:
                self._lose("has gone")
        answer, descriptors = received
        if "error" in answer:
            if answer["error"] == "memory":
                raise TooLittleMemoryError(answer["message"], answer["needed_bytes"], answer["available_bytes"])
            if answer["error"] == "damaged":
                chunk = None if answer["chunk"] < 0 else answer["chunk"]
                raise DamagedError(fields["shard"], fields["step"], chunk, "a peer's copy differs from what was captured")
            kind = NoCopyError if answer["error"] == "peer" else KeeperError
            raise kind(f"the keeper refused {do}: {answer['message']}")
        return answer, descriptors

    def _lose(self, how: str) -> NoReturn:
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        raise KeeperLostError(
            f"the keeper of job {self.job!r} {how}; what it held is lost, and a new KeeperClient starts another one"
        ) from None

    def _map(self, shard: str, slot: int, number: int, descriptor: int) -> mmap:
        try:
            known = self._blocks.get((shard, slot))
            if known is None or known[0] != number:
                if known is not None:
                    self._views.pop(id(known[1]), None)
                self._blocks[shard, slot] = (number, slots.map_block(descriptor, writable=True))
        finally:
            os.close(descriptor)
        return self._blocks[shard, slot][1]

    def _views_into(self, block: mmap, packed: Packed, layout: slot_tensors.Layout) -> list[Tensor]:
        """Return the places in a block; they are the same at each capture of an unchanged model, and making them takes time."""
        key = (layout.tensors, [(tensor.dtype, tensor.shape) for tensor in packed.tensors])
        known = self._views.get(id(block))
        if known is None or known[0] != key:
            self._views[id(block)] = known = (key, slot_tensors.views_into(block, packed, layout))
        return known[1]

    def _check_still_there(self, shard: str, step: int, generation: int) -> None:
        answer, _ = self._ask("generations", shard=shard)
        if not any(entry["generation"] == generation and entry["state"] != "writing" for entry in answer["generations"]):
            raise KeeperError(f"step {step} of shard {shard!r} was overwritten while it was read; read a newer one")

    def _forget_blocks(self) -> None:
        # Not closed: a thread may still be copying. The memory goes when the last view has gone.
        self._views.clear()
        self._blocks.clear()


def block_bytes(packed: Packed, meta: dict[str, Any]) -> int:
    """Return the bytes of a slot that a state takes, for ``KeeperClient.reserve``."""
    return slot_tensors.plan(packed, 0, meta).block_bytes


_clients: "weakref.WeakSet[KeeperClient]" = weakref.WeakSet()


def _leave_connections() -> None:
    """Close, in a forked child such as a loader's worker, what it inherited: else the keeper would not see its client die."""
    for client in list(_clients):
        if client._connection is not None:
            client._connection.close()
            client._connection = None
        client._lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_connections)
