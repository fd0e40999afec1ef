"""The folder of a job's steps on disk: whose it is, who may change it, how a step comes into it and goes.

A folder of a step is made under a name that begins with a dot, and renamed. Whoever changes anything holds a lock on the
whole, so that what has a temporary name then was left by a writer that is dead.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience.disk_steps import FORMAT_VERSION, PREFIX, numbered, steps

RUN_FILE = "run.json"
UNFINISHED, REPLACED = ".part", ".old"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL, errno.ENOSYS)  # of network file systems


def claim(disk_dir: str | Path, job: str) -> None:
    """Make a folder the one of a job, or see that it is.

    Raises:
        InputError: if it is another job's, holds steps of nobody knows whom, or cannot be made or written.
    """
    disk_dir = Path(disk_dir)
    try:
        disk_dir.mkdir(parents=True, exist_ok=True)
        if _is_of(disk_dir, job):
            return  # without the lock, which a writer of the run's last start may hold for long
        with locked(disk_dir):
            if not _is_of(disk_dir, job):
                _write_run(disk_dir, {"format": FORMAT_VERSION, "job": job, "ended": False})
    except OSError as error:
        raise refusal(disk_dir, error) from error


def read_run(disk_dir: str | Path) -> dict[str, Any] | None:
    """Return what ``run.json`` says of a folder: its ``job``, and whether the job ``ended`` cleanly; None if there is none."""
    try:
        record = json.loads((Path(disk_dir) / RUN_FILE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def mark_ended(disk_dir: str | Path, ended: bool = True) -> None:
    """Say that the run of a folder has ended cleanly and needs no going on, or that another one has begun to write there."""
    record = read_run(disk_dir)
    if record is not None and record.get("ended") != ended:
        _write_run(Path(disk_dir), {**record, "ended": ended})


def prune(disk_dir: str | Path, newest: int, keep: int, past: int | None = None) -> None:
    """Keep a step that is known to be whole and the newest whole ones before it, and remove all others; the lock must be held.

    Args:
        disk_dir: the folder.
        newest: the step that was written last; those with a higher number are of a past that was given up.
        keep: how many are kept, 1 or more.
        past: the step that the run went on from: those between it and ``newest`` are not the run's own. None if all are.
    """
    left = keep - 1
    for one in steps(disk_dir, thorough=False):
        if one.step == newest:
            continue
        own = one.step < newest and (past is None or one.step <= past)
        if own and not one.damage and left > 0:
            left -= 1
            continue
        _remove(one.path)


@contextmanager
def locked(disk_dir: Path) -> Iterator[bool]:
    """Hold the lock on a folder; yields False where the file system has no locks.

    Raises:
        OSError: if the folder cannot be opened.
    """
    descriptor = os.open(disk_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)


def sweep(disk_dir: Path) -> None:
    """Remove what dead writers left; the lock must be held."""
    for path in disk_dir.glob(f".{PREFIX}*"):
        step = disk_dir / path.name[1:].partition(".")[0]
        if path.suffix == REPLACED and not step.exists():
            os.rename(path, step)  # killed between the two renames of a replacement: the old one is all there is
        elif path.suffix in (REPLACED, UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)


def fill_and_move(path: Path, fill: Callable[[Path], None], within: Path | None = None) -> None:
    """Have a folder filled under a temporary name and give it its own; no other writer may be at work around it.

    Args:
        path: the folder.
        fill: writes its files.
        within: where the temporary name is, on the same file system; None is beside ``path``.
    """
    temporary = (within or path.parent) / f".{path.name}.{os.getpid()}{UNFINISHED}"
    try:
        temporary.mkdir()
        fill(temporary)
        move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a finished folder its name, durably; the lock must be held."""
    sync_folder(temporary)
    aside = path.with_name(f".{path.name}.{os.getpid()}{REPLACED}")
    if path.exists():
        os.rename(path, aside)
        failpoint("resilience/disk/moved_aside")
    try:
        failpoint("resilience/disk/rename")
        os.rename(temporary, path)
    except OSError:
        if aside.exists():
            os.rename(aside, path)
        raise
    failpoint("resilience/disk/renamed")
    sync_folder(path.parent)
    if aside.exists():
        shutil.rmtree(aside)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    failpoint("resilience/disk/folder_sync")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    failpoint("resilience/disk/folder_synced")


def refusal(disk_dir: Path, error: OSError) -> InputError:
    """Return the sentence for an error of the file system."""
    reason = error.strerror or str(error)
    return InputError(f"nothing can be kept in {disk_dir}: {reason}; free space or permit it there, or give another disk_dir")


def _is_of(disk_dir: Path, job: str) -> bool:
    """Return whether a folder is a job's; False if it is nobody's yet."""
    record = read_run(disk_dir)
    if record is None:
        if numbered(disk_dir):
            raise InputError(f"{disk_dir} holds steps but no {RUN_FILE} that says whose; give another disk_dir")
        return False
    if record.get("job") != job:
        whose = f"job {record['job']!r}" if "job" in record else "a run that is not MemoryCheckpoint's"
        raise InputError(f"{disk_dir} belongs to {whose}, not to job {job!r}; give another disk_dir, or remove it")
    return True


def _remove(path: Path) -> None:
    """Remove a step in one go: under a name that does not count first."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    failpoint("resilience/disk/remove")
    os.rename(path, doomed)
    failpoint("resilience/disk/removed")
    shutil.rmtree(doomed, ignore_errors=True)


def _write_run(disk_dir: Path, record: dict[str, Any]) -> None:
    with atomic_write(disk_dir / RUN_FILE, "w") as file:
        file.write(json.dumps(record) + "\n")
