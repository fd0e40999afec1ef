"""A slot: one block of shared memory that holds one generation of a shard, and says of itself whether it is whole.

    header page | data: tensors, each at a multiple of 64 bytes, then the skeleton | manifest (JSON)

The header names the places, the digest of the manifest, and last of all the generation: 0 while somebody writes. The manifest
lists the step, dtype, shape and place of each tensor, and the checksums of the data in chunks. Whoever reads checks header ->
manifest -> data, and that step and generation are those meant, so that neither damage nor an old shard passes.

No torch here: the keeper, which must start fast, uses this file. Tensors go in and out in ``slot_tensors``.
"""

import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES, Buffer, chunk_checksums, first_damage, manifest_digest

HEADER_BYTES = 4096
ALIGNMENT = 64
FORMAT_VERSION = 1
_MAGIC = b"LPSLOT\r\n"
_HEADER = struct.Struct("<8sIIQQQ32s")  # magic, version, chunk, data bytes, manifest's place and bytes, its digest
_GENERATION = struct.Struct("<Q")
_STEP_BYTES = 64 << 20
_CHECKSUM_CHARACTERS = 12  # of a checksum in JSON, comma and space included


class DamagedError(RuntimeError):
    """What was kept is not what was captured.

    Attributes:
        shard: name.
        step: that was asked for.
        chunk: number of the 4 MiB that differ, counted from 0; None where header or manifest differ.
    """

    def __init__(self, shard: str, step: int, chunk: int | None, what: str) -> None:
        super().__init__(f"shard {shard!r} of step {step} is damaged: {what}; use another copy or an older step")
        self.shard, self.step, self.chunk = shard, step, chunk


class Place(NamedTuple):
    """Where something lies, in bytes from the block's start."""

    offset: int
    bytes: int


def aligned(offset: int, to: int = ALIGNMENT) -> int:
    """Return the next multiple of ``to`` that is not below ``offset``."""
    return -(-offset // to) * to


def manifest_place(data_bytes: int, draft_bytes: int) -> Place:
    """Return where the manifest goes, with room for the checksums that ``seal_block`` adds to a draft of the given length."""
    chunks = -(-data_bytes // CHUNK_BYTES)
    return Place(aligned(HEADER_BYTES + data_bytes), draft_bytes + chunks * _CHECKSUM_CHARACTERS + 256)


def make_block(capacity_bytes: int, available: Callable[[], int]) -> int:
    """Return the descriptor of a new block of shared memory without a name, all of its pages present.

    Args:
        capacity_bytes: rounded up to whole pages.
        available: how many bytes may be taken now. It is asked again and again: nothing else stops a block that outgrows the
            host, and the kernel would kill others for it, as memory without a process is on nobody's account.

    Raises:
        OSError: if the memory is not there (ENOSPC or ENOMEM).
    """
    capacity_bytes = aligned(capacity_bytes, mmap.PAGESIZE)
    descriptor = os.memfd_create("lightning-plugins-slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, capacity_bytes)
        # Now, not at the first capture; and memory that is not there is an error here instead of a SIGBUS there.
        for start in range(0, capacity_bytes, _STEP_BYTES):
            step = min(_STEP_BYTES, capacity_bytes - start)
            if step > available():
                raise OSError(errno.ENOMEM, f"only {start} of {capacity_bytes} bytes were there")
            os.posix_fallocate(descriptor, start, step)
        # A block that somebody cuts short would kill whoever reads it.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_block(descriptor: int, writable: bool, populate: bool = True) -> mmap.mmap:
    """Return the block as memory of this process; the descriptor may be closed afterwards.

    Args:
        descriptor: of the block.
        writable: whether what is written reaches the block; if not, it stays in a private copy, page by page.
        populate: whether all pages of a writable one are mapped at once, which stops all threads of this process meanwhile.
    """
    flags = (mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)) if writable else mmap.MAP_PRIVATE
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=flags)


def invalidate(block: mmap.mmap) -> None:
    """Say that nothing whole is in the block; to be done before anything else is written to it."""
    _GENERATION.pack_into(block, _HEADER.size, 0)


def generation_of(block: Buffer | mmap.mmap) -> int:
    """Return the generation in the header, 0 if the block holds nothing whole."""
    return int(_GENERATION.unpack_from(block, _HEADER.size)[0])


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as bytes.

    Raises:
        TypeError: if it holds what JSON does not.
    """
    return json.dumps(manifest, separators=(",", ":")).encode()


def stored_manifest(block: mmap.mmap) -> bytes:
    """Return the manifest's bytes, wherever the header says; they may be damaged, and are none where the header is."""
    _, _, _, _, offset, manifest_bytes, _ = _HEADER.unpack_from(block)
    return block[offset : offset + manifest_bytes]


def content_digest(manifest: dict[str, Any]) -> bytes:
    """Return what two slots have in common if and only if step, meta, tensors and every bit of them are the same."""
    return manifest_digest(encode_manifest({name: value for name, value in manifest.items() if name != "generation"}))


def seal_block(block: mmap.mmap, data_bytes: int, draft_bytes: int, generation: int) -> tuple[dict[str, Any], bytes]:
    """Compute the checksums of what a writer has left, complete its draft of a manifest with them, and make the header valid.

    Args:
        block: with data and draft in their places.
        data_bytes: length of the data.
        draft_bytes: length of the draft.
        generation: number of this writing, 1 or more.

    Returns:
        The manifest and its digest.

    Raises:
        ValueError: if places or draft are not what this format allows; the block stays invalid.
    """
    offset, room = manifest_place(data_bytes, draft_bytes)
    if data_bytes < 0 or draft_bytes < 0 or offset + room > len(block):
        raise ValueError(f"{data_bytes} bytes of data and {draft_bytes} of manifest do not fit into a block of {len(block)}")
    manifest = json.loads(block[offset : offset + draft_bytes])
    _check_manifest(manifest, data_bytes)
    with memoryview(block) as view, view[HEADER_BYTES : HEADER_BYTES + data_bytes] as data:
        checksums = chunk_checksums(data)
    manifest |= {"generation": generation, "data_bytes": data_bytes, "checksums": checksums}
    encoded = encode_manifest(manifest)
    if len(encoded) > room:
        raise ValueError(f"the manifest takes {len(encoded)} bytes where {room} are left for it")
    block[offset : offset + len(encoded)] = encoded
    digest = manifest_digest(encoded)
    _HEADER.pack_into(block, 0, _MAGIC, FORMAT_VERSION, CHUNK_BYTES, data_bytes, offset, len(encoded), digest)
    _GENERATION.pack_into(block, _HEADER.size, generation)
    return manifest, digest


def check_block(block: Buffer, shard: str, step: int, generation: int, digest: bytes) -> dict[str, Any]:
    """Return the manifest of a block after every byte that matters has been checked.

    Args:
        block: the bytes, from wherever they come.
        shard: name, for the error.
        step: that has to be in it.
        generation: that has to be in it.
        digest: of the manifest, as it was when the block was sealed.

    Raises:
        DamagedError: naming what differs first.
    """
    if len(block) < HEADER_BYTES:
        raise DamagedError(shard, step, None, f"only {len(block)} bytes are there")
    magic, version, chunk_bytes, data_bytes, offset, manifest_bytes, in_header = _HEADER.unpack_from(block)
    if (magic, version, chunk_bytes) != (_MAGIC, FORMAT_VERSION, CHUNK_BYTES):
        raise DamagedError(shard, step, None, f"its header is not that of a slot of format {FORMAT_VERSION}")
    encoded = bytes(block[offset : offset + manifest_bytes])
    if in_header != digest or manifest_digest(encoded) != digest:
        raise DamagedError(shard, step, None, "its manifest is not the one that was sealed")
    manifest: dict[str, Any] = json.loads(encoded)
    found = (manifest["step"], manifest["generation"], manifest["data_bytes"])
    if found != (step, generation, data_bytes) or generation_of(block) != generation:
        raise DamagedError(shard, step, None, f"it holds step {found[0]} in generation {found[1]}, not {step} in {generation}")
    data = block[HEADER_BYTES : HEADER_BYTES + data_bytes]
    damage = first_damage(data, manifest["checksums"])
    if damage is not None:
        raise DamagedError(shard, step, damage, f"chunk {damage} of {len(manifest['checksums'])} has another checksum")
    return manifest


def _check_manifest(manifest: Any, data_bytes: int) -> None:
    places = [manifest["skeleton"], *(tensor[2:] for tensor in manifest["tensors"])]
    if not isinstance(manifest["step"], int) or not isinstance(manifest["meta"], dict):
        raise ValueError("a manifest needs a whole number as its step and a dict as its meta")
    for offset, length in places:
        if not 0 <= offset <= offset + length <= data_bytes:
            raise ValueError(f"the manifest names bytes {offset} to {offset + length} of {data_bytes}")
