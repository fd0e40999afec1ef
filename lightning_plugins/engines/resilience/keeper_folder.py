"""The private folder where keeper and clients meet, and how the one keeper of a user on a node comes to be.

Whoever holds the lock on ``keeper.lock`` is the keeper, or is about to become it: a client that finds no keeper takes the lock
and starts one, which inherits it and keeps it until the kernel gives it back. So two clients that start at once get one keeper,
and what a killed one leaves (its socket, its unlocked lock file) stops nobody.
"""

import contextlib
import fcntl
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.messages import peer_uid
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE

SOCKET, LOCK, LOG = "keeper.sock", "keeper.lock", "keeper.log"
START_S = 20.0
_MODULE = "lightning_plugins.engines.resilience.keeper"


class KeeperError(RuntimeError):
    """The keeper refuses, or does not answer as it should."""


class KeeperLostError(KeeperError):
    """The keeper has gone, and what it held with it."""


def private_folder(folder: str | Path | None = None) -> Path:
    """Return the folder, made if it is not there, after checking that it is this user's alone.

    Args:
        folder: None stands for ``$XDG_RUNTIME_DIR/lightning-plugins`` where that variable names a folder of this user's, else for
            ``lightning-plugins-UID`` in the system's folder for temporary files.

    Raises:
        InputError: if it is not a folder, belongs to somebody else, or others may enter it.
    """
    path = _default_folder() if folder is None else Path(folder).absolute()
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(f"the keeper's folder {path} is not a folder; remove it, or give another with folder=")
    if status.st_uid != os.geteuid():
        raise InputError(
            f"the keeper's folder {path} belongs to user {status.st_uid}, not {os.geteuid()}; give another with folder="
        )
    if status.st_mode & 0o077:
        raise InputError(f"others may enter the keeper's folder {path}; run chmod 700 on it, or give another with folder=")
    return path


def _default_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.geteuid():
        return Path(runtime) / "lightning-plugins"
    return Path(tempfile.gettempdir()) / f"lightning-plugins-{os.geteuid()}"


def connect(folder: Path) -> socket.socket | None:
    """Return a connection to the keeper of a folder, or None if none listens there.

    Raises:
        KeeperError: if it is another user's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short_path(folder) as path:
            connection.connect(path)
        if peer_uid(connection) != os.geteuid():
            raise KeeperError(f"user {peer_uid(connection)} listens in the keeper's folder {folder}; give another with folder=")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def listen(folder: Path) -> socket.socket:
    """Return the keeper's listening socket; only the holder of the lock may call this."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(folder) as path:
        Path(path).unlink(missing_ok=True)  # a killed keeper's
        listener.bind(path)
    listener.listen(128)
    return listener


def take_lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock until its last copy is closed, or None if somebody else has it."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A keeper removes the file when it ends: a lock on a file without a name locks nobody out.
        if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def remove_files(folder: Path) -> None:
    """Remove what a keeper has in its folder; only the holder of the lock may call this, as its last act."""
    for name in (SOCKET, LOG, LOCK):
        (folder / name).unlink(missing_ok=True)


def connect_or_start(folder: Path) -> socket.socket:
    """Return a connection to the keeper of a folder, started if there is none.

    Raises:
        KeeperError: if it cannot be started.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (connection := connect(folder)) is not None:
            return connection
        if (lock := take_lock(folder)) is not None:
            try:
                _start(folder, lock)
            finally:
                os.close(lock)
        else:
            time.sleep(0.005)  # another client starts one, or the old one is about to be gone
    raise KeeperError(f"no keeper could be reached in {folder} for {START_S:g} s; see {folder / LOG} and end what holds {LOCK}")


def _start(folder: Path, lock: int) -> None:
    """Start a keeper and return when it listens: the process started here ends then, and leaves the keeper as an orphan."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", _MODULE, str(folder), str(lock)]
    environ = dict(os.environ)
    if FILE_VARIABLE in environ:  # the keeper works in another folder, and reads the secret from there
        environ[FILE_VARIABLE] = os.path.abspath(environ[FILE_VARIABLE])
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # In the package's own folder, so that the keeper imports the same package wherever the trainer has it from.
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock],
        )
    finally:
        os.close(log)
    try:
        code = process.wait(START_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = -9
    if code != 0:
        said = (folder / LOG).read_text(errors="replace").strip().splitlines()
        raise KeeperError(f"the keeper could not be started ({' '.join(command[:3])}, exit code {code}): {' '.join(said[-1:])}")


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """Name the socket through a descriptor of its folder: the names of sockets end at 107 bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
