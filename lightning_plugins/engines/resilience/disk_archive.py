"""A checksum inside an ordinary ``torch.save`` file: whoever does not know of it reads the file as ever.

``torch.save`` writes a zip archive, and an archive may end with a comment. Ours is

    lightning-plugins crc32/4MiB sha256 <64 digits>

where the digits are the sha256 of the CRC-32 of each 4 MiB of all that stands before the comment's length. The archive has a
CRC-32 of each tensor as well, but ``torch.load`` does not look at them.
"""

import hashlib
import re
import struct
import zlib
from pathlib import Path
from typing import IO, Any, cast

import torch

from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES
from lightning_plugins.engines.resilience.disk_steps import DamagedFileError

_COMMENT = "lightning-plugins crc32/4MiB sha256 {}"
_COMMENT_BYTES = len(_COMMENT.format("0" * 64))
_END, _END_BYTES = b"PK\x05\x06", 22  # the archive's last record, without the comment
_LENGTH = struct.Struct("<H")
_ZIP, _LEGACY = b"PK\x03\x04", b"\x80"  # how torch's files begin: of today, and before 1.6


def save_checked(value: Any, file: IO[bytes]) -> None:
    """Write a value as ``torch.save`` does, and the checksum behind it.

    Args:
        value: anything that ``torch.save`` takes.
        file: empty, open for writing; left open.
    """
    sums = _Sums(file)
    torch.save(value, cast(IO[bytes], sums))
    # The archive ends with the length of its comment, 0, in two bytes.
    file.seek(-_LENGTH.size, 2)
    file.write(_LENGTH.pack(_COMMENT_BYTES) + _COMMENT.format(sums.digest()).encode())


def check_archive(path: str | Path) -> bool:
    """Compare a file with its checksum, and return whether it has one.

    Raises:
        DamagedFileError: if it is not what was written, or was cut short.
        FileNotFoundError: if it is not there.
    """
    path = Path(path)
    with path.open("rb") as file:
        begin = file.read(len(_ZIP))
        size = file.seek(0, 2)
        tail_bytes = min(size, _END_BYTES + _COMMENT_BYTES)
        file.seek(size - tail_bytes)
        tail = file.read()
        found = re.fullmatch(_COMMENT.format("([0-9a-f]{64})").encode(), tail[-_COMMENT_BYTES:])
        if found is not None and tail[:-_COMMENT_BYTES].endswith(_LENGTH.pack(_COMMENT_BYTES)):
            if _digest_of(file, size - _COMMENT_BYTES - _LENGTH.size) != found[1].decode():
                raise DamagedFileError(path, -1, None, "differs from its checksum")
            return True
    plain = begin == _ZIP and tail[-_END_BYTES:].startswith(_END) and tail.endswith(_LENGTH.pack(0))
    if not plain and begin[:1] != _LEGACY:
        raise DamagedFileError(path, -1, None, "does not begin and end as a checkpoint does")
    return False


class _Sums:
    """A file for ``torch.save`` that remembers checksums; the last two bytes do not count."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._held = b""
        self._chunk, self._chunk_bytes = 0, 0
        self._all = hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        if len(view) >= _LENGTH.size:
            self._add(memoryview(self._held))
            self._add(view[: -_LENGTH.size])
            self._held = bytes(view[-_LENGTH.size :])
        else:
            both = self._held + bytes(view)
            self._add(memoryview(both[: -_LENGTH.size]))
            self._held = both[-_LENGTH.size :]
        return len(view)

    def flush(self) -> None:
        pass

    def digest(self) -> str:
        if self._chunk_bytes:
            self._all.update(self._chunk.to_bytes(4, "little"))
            self._chunk_bytes = 0
        return self._all.hexdigest()

    def _add(self, view: memoryview) -> None:
        while len(view):
            part = view[: CHUNK_BYTES - self._chunk_bytes]
            self._chunk = zlib.crc32(part, self._chunk)
            self._chunk_bytes += len(part)
            if self._chunk_bytes == CHUNK_BYTES:
                self._all.update(self._chunk.to_bytes(4, "little"))
                self._chunk = self._chunk_bytes = 0
            view = view[len(part) :]


def _digest_of(file: IO[bytes], length: int) -> str:
    whole = hashlib.sha256()
    file.seek(0)
    while length:
        chunk = file.read(min(CHUNK_BYTES, length))
        if not chunk:
            break
        whole.update(zlib.crc32(chunk).to_bytes(4, "little"))
        length -= len(chunk)
    return whole.hexdigest()
