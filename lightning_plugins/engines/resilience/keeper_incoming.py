"""A shard that comes from another host, piece by piece, into a slot of this keeper: unreadable until every checksum is right."""

import json
from typing import Any

from lightning_plugins.engines.resilience import slots
from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES, Buffer, manifest_digest
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.keeper_slots import RefusedError
from lightning_plugins.engines.resilience.slots import HEADER_BYTES, DamagedError

_ADDED = ("generation", "data_bytes", "checksums")  # by ``seal_block``, to the writer's draft
MOST_MANIFEST_BYTES = 16 << 20


def num_chunks(data_bytes: int) -> int:
    """Return the number of pieces that data travels in, one for each checksum."""
    return -(-data_bytes // CHUNK_BYTES)


def chunk_place(number: int, data_bytes: int) -> slots.Place:
    """Return where a piece lies in a block.

    Raises:
        RefusedError: if there is no piece of that number.
    """
    if not 0 <= number < num_chunks(data_bytes):
        raise RefusedError(f"there is no chunk {number} of {num_chunks(data_bytes)}")
    start = number * CHUNK_BYTES
    return slots.Place(HEADER_BYTES + start, min(CHUNK_BYTES, data_bytes - start))


class Incoming:
    """A shard that is arriving. It takes a slot, and never the one that was committed last.

    Args:
        records: of this keeper.
        client: number of the writer.
        target: job, shard and step.
        manifest: as it stands at the source.
        digest: of the manifest, as the source's keeper remembers it.
        written_at: seconds since 1970.
        copy: see ``Records.begin``.

    Attributes:
        generation: number of this writing.
        data_bytes: that have to arrive.

    Raises:
        DamagedError: if the manifest is not the one with the digest.
        RefusedError: if it is none, is another step's, or there is not as much memory.
    """

    def __init__(
        self,
        records: Records,
        client: int,
        target: tuple[str, str, int],
        manifest: Buffer,
        digest: bytes,
        written_at: float,
        copy: bool,
    ) -> None:
        self._records, self._client, self._written_at = records, client, written_at
        self._job, self._shard, self._step = target
        if manifest_digest(manifest) != digest:
            raise DamagedError(self._shard, self._step, None, "its manifest is not the one that was sealed")
        parsed = _parsed(manifest, self._step)
        self.data_bytes: int = parsed["data_bytes"]
        self._checksums: list[int] = parsed["checksums"]
        self._draft = slots.encode_manifest({name: value for name, value in parsed.items() if name not in _ADDED})
        self._missing = set(range(num_chunks(self.data_bytes)))
        self._place = slots.manifest_place(self.data_bytes, len(self._draft))
        _, self.generation, _ = records.begin(client, *target, sum(self._place), copy)

    def write(self, number: int, data: Buffer) -> None:
        """Take a piece.

        Raises:
            RefusedError: if it has not the length that it should, or the slot was taken for something else.
        """
        offset, length = chunk_place(number, self.data_bytes)
        if len(data) != length:
            raise RefusedError(f"chunk {number} has {length} bytes, got {len(data)}")
        self._records.write((self._job, self._shard, self.generation), offset, memoryview(data))
        self._missing.discard(number)

    def seal(self) -> None:
        """Make the slot readable, if what lies in it is what the manifest says.

        Raises:
            DamagedError: if a checksum differs; the slot is empty then.
            RefusedError: if pieces are missing, or the slot was taken for something else.
        """
        if self._missing:
            raise RefusedError(f"{len(self._missing)} of {num_chunks(self.data_bytes)} chunks have not arrived")
        slot, block = self._records.start_seal(self._client, self._job, self._shard, self.generation)
        sealed, damage = None, None
        try:
            offset = self._place.offset
            block.mapping[offset : offset + len(self._draft)] = self._draft
            found = slots.seal_block(block.mapping, self.data_bytes, len(self._draft), self.generation)
            pairs = zip(found[0]["checksums"], self._checksums, strict=True)
            damage = next((number for number, (one, other) in enumerate(pairs) if one != other), None)
            sealed = found if damage is None else None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RefusedError(f"the manifest of shard {self._shard!r} is none: {error}") from error
        finally:
            self._records.finish_seal(slot, self.generation, sealed, self._written_at)
        if damage is not None:
            raise DamagedError(self._shard, self._step, damage, f"chunk {damage} of {len(self._checksums)} has another checksum")


def _parsed(encoded: Buffer, step: int) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(bytes(encoded))
        found, data_bytes, checksums = manifest["step"], manifest["data_bytes"], manifest["checksums"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError(f"a manifest is none: {type(error).__name__}: {error}") from error
    if found != step:
        raise RefusedError(f"a manifest of step {found} came where {step} was due")
    if type(data_bytes) is not int or not 0 <= data_bytes < 1 << 62:
        raise RefusedError(f"data_bytes of a manifest must be a whole number, 0 or more, got {data_bytes!r}")
    if not isinstance(checksums, list) or len(checksums) != num_chunks(data_bytes):
        raise RefusedError(f"a manifest of {data_bytes} bytes needs {num_chunks(data_bytes)} checksums")
    return manifest
