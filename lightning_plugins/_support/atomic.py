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
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else ""
    with _atomic(Path(path), UNFINISHED) as temporary, temporary.open(mode, encoding=encoding, newline=newline) as file:
        yield file


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give the name of a temporary file that becomes ``path`` when the block ends, as with ``atomic_write``.

    It is for writers that open a file by its name, and tell its format by its suffix, which is that of ``path``.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: as ``atomic_write`` does.
    """
    with _atomic(Path(path), UNFINISHED + Path(path).suffix) as temporary:
        yield temporary


@contextmanager
def _atomic(path: Path, ending: str) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=ending, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        failpoint("atomic_write/replace")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that killed writers left anywhere under ``folder``; nobody may be writing there."""
    for pattern in (f".*{UNFINISHED}", f".*{UNFINISHED}.*"):
        for path in folder.rglob(pattern):
            path.unlink(missing_ok=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
