"""Bring a shard from another host's keeper into this one, checked against its manifest; ask what such a keeper holds."""

import json
from typing import Any

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES
from lightning_plugins.engines.resilience.keeper_incoming import MOST_MANIFEST_BYTES, Incoming, num_chunks
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.keeper_slots import RefusedError
from lightning_plugins.engines.resilience.peer_wire import PeerConnection

PEER_S = 10.0  # to answer, and for each MiB
_MOST_LISTED_BYTES = 16 << 20


def fetch(records: Records, client: int, target: tuple[str, str, int], connection: PeerConnection) -> int:
    """Take a step of a shard from a peer; it is committed here if it was there.

    Args:
        records: of this keeper.
        client: number of who wants it.
        target: job, shard and step.
        connection: to the peer.

    Returns:
        The bytes of data that were taken.

    Raises:
        AnswerError: if the peer does not hold it, or writes it anew meanwhile.
        PeerError: if the connection ended.
        DamagedError: if what the peer holds is not what was captured.
        RefusedError: if there is not as much memory, or the peer's description makes no sense.
    """
    job, shard, step = target
    found = connection.request("find", {"shard": shard, "step": step}).header
    try:
        generation, manifest_bytes, state = int(found["generation"]), int(found["manifest_bytes"]), str(found["state"])
        digest, written_at = bytes.fromhex(found["digest"]), float(found["written_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"the peer describes shard {shard!r} as nobody does: {type(error).__name__}: {error}") from error
    if not 0 <= manifest_bytes <= MOST_MANIFEST_BYTES:
        raise RefusedError(f"the peer names a manifest of {manifest_bytes} bytes; at most {MOST_MANIFEST_BYTES} are taken")
    asked = {"shard": shard, "step": step, "generation": generation}
    manifest = connection.request("manifest", asked, into=bytearray(manifest_bytes)).data
    incoming = Incoming(records, client, target, manifest, digest, written_at, copy=False)
    piece = memoryview(bytearray(min(CHUNK_BYTES, incoming.data_bytes)))
    for number in range(num_chunks(incoming.data_bytes)):
        incoming.write(number, connection.request("chunk", {**asked, "chunk": number}, into=piece).data)
    incoming.seal()
    if state == "committed":
        records.commit_copy(job, shard, incoming.generation)
    return incoming.data_bytes


def peer_generations(connection: PeerConnection) -> list[dict[str, Any]]:
    """Return what a peer holds, as ``Records.generations`` describes it.

    Raises:
        PeerError: if the connection ended.
        RefusedError: if the answer is no such list.
    """
    listed = connection.request("list", into=bytearray(_MOST_LISTED_BYTES)).data
    try:
        found: list[dict[str, Any]] = json.loads(bytes(listed))
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the peer's list is none: {error}") from error
    return found
