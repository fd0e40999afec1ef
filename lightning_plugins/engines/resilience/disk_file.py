"""A file that is written once, front to back, with the checksum of each 4 MiB, and that is on the disk when it is closed."""

import os
import zlib
from pathlib import Path
from typing import Any

from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience.checksums import CHUNK_BYTES

_DRAIN_BYTES = 32 << 20


class ChecksummedFile:
    """A new file for writing; ``with`` brings it to the disk and closes it.

    Args:
        path: the file, which must not exist.

    Attributes:
        bytes: written so far.
    """

    def __init__(self, path: Path) -> None:
        self.bytes = 0
        self._checksums: list[int] = []
        self._drained_bytes = 0
        self._file = path.open("xb", buffering=1 << 20)

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        try:
            if kind is None:
                failpoint("resilience/disk/file_sync")
                self._drain()
                failpoint("resilience/disk/file_synced")
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        """Append bytes and return their number.

        Raises:
            OSError: as the file system says.
        """
        failpoint("resilience/disk/write")
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            room = CHUNK_BYTES - self.bytes % CHUNK_BYTES
            part = view[start : start + room]
            if self.bytes % CHUNK_BYTES == 0:
                self._checksums.append(0)
            self._checksums[-1] = zlib.crc32(part, self._checksums[-1])
            self._file.write(part)
            start, self.bytes = start + len(part), self.bytes + len(part)
        if self.bytes - self._drained_bytes >= _DRAIN_BYTES:
            self._drain()
        return len(view)

    def flush(self) -> None:
        """Do nothing: torch flushes after every tensor, and the disk wants few large writes."""

    def entry(self) -> dict[str, Any]:
        """Return what a manifest says of the file."""
        return {"bytes": self.bytes, "crc32": self._checksums}

    def _drain(self) -> None:
        """Bring to the disk what was written, and give the page cache back: the training needs the memory, nobody the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._drained_bytes = self.bytes
