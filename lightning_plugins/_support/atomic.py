"""Files that appear whole or not at all: temporary name in the same folder, flush, fsync, rename."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_plugins._support.failpoints import failpoint

UNFINISHED = ".part"


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes ``path`` when the block ends, and vanishes if the block raises.

    Args:
        path: the file to write; its folder must exist.
        mode: ``"wb"`` or ``"w"``.

    Raises:
        OSError: as the file system says (no space, no permission); ``path`` then holds what it held before.
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        failpoint("atomic_write/replace")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed writers left anywhere under ``folder``; nobody may be writing there."""
    for path in folder.rglob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
