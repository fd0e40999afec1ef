"""The job's secret: where it comes from, how it is kept out of sight, and the keys that are made of it.

It comes from a file that only we can read or from a variable that our launcher sets, and from nowhere else: arguments show
in process lists, stores and configs are read by others, and logs are kept. Keys are made as in RFC 5869 (HKDF, Krawczyk and
Eronen, 2010), with SHA-256 and one block of output:

    key = HMAC(HMAC(context, secret), purpose | 0x01)
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from lightning_plugins._support.atomic import UNFINISHED
from lightning_plugins._support.errors import InputError

FILE_VARIABLE = "LIGHTNING_PLUGINS_JOB_SECRET_FILE"
VARIABLE = "LIGHTNING_PLUGINS_JOB_SECRET"
SHORTEST_BYTES = 16
LONGEST_BYTES = 4096  # more is some other file
_PRIVATE = 0o600


class Secret:
    """What all hosts of a job know and nobody else does.

    Args:
        value: at least 16 bytes.

    Raises:
        InputError: if there are fewer.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        _check_length(value, "a secret")
        self._value = bytes(value)

    def key(self, purpose: bytes, context: bytes) -> bytes:
        """Return 32 bytes that tell nothing about the secret or about the key of any other purpose or context.

        Args:
            purpose: what the key is for, such as a direction.
            context: what the key is bound to, such as the nonces of a connection.
        """
        extracted = hmac.digest(context, self._value, hashlib.sha256)
        return hmac.digest(extracted, purpose + b"\x01", hashlib.sha256)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> NoReturn:
        # What is pickled ends in files, queues and other processes' memory.
        raise TypeError(f"a secret is not copied or pickled; the other process reads it from {FILE_VARIABLE}")


def secret_mark(secret: Secret) -> str:
    """Return what tells two secrets apart, and nothing of either: for processes of one user on one host."""
    return secret.key(b"mark", b"").hex()


def job_secret(environ: Mapping[str, str] | None = None) -> Secret | None:
    """Return the job's secret, or None if no variable names one.

    White space around it does not count: editors and shells add line ends.

    Args:
        environ: where the variables stand; None: this process's environment.

    Raises:
        InputError: if both variables are set, the file is missing, not private or not ours, or there are fewer than 16 bytes.
    """
    environ = os.environ if environ is None else environ
    path, value = environ.get(FILE_VARIABLE), environ.get(VARIABLE)
    if path is not None and value is not None:
        raise InputError(f"both {FILE_VARIABLE} and {VARIABLE} are set, and they may differ; unset one of them")
    if path is not None:
        return Secret(_read(path))
    if value is not None:
        stripped = os.fsencode(value).strip()
        _check_length(stripped, f"the variable {VARIABLE}")
        return Secret(stripped)
    return None


def new_secret_file(path: str | Path) -> Secret:
    """Make a file of mode 0600 with a new secret, whole or not at all, and return the secret.

    It is 32 random bytes written as 64 hexadecimal digits, so that a launcher can hand it on in the variable too.

    Args:
        path: the file; its folder must exist.

    Raises:
        InputError: if ``path`` exists: a running job may be using it.
        OSError: as the file system says.
    """
    path = Path(path)
    value = secrets.token_hex(32).encode()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    # Not atomic_write: it gives the file the mode of the umask before it appears, and replaces what was there.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), _PRIVATE)  # an odd umask can have taken our own right to read
            file.write(value + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails if the path exists, where a rename would replace it
    except FileExistsError:
        raise InputError(f"{path} exists and may be the secret of a running job; use it, remove it or name another") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return Secret(value)


def _read(path: str) -> bytes:
    named = f"the file {path!r} that {FILE_VARIABLE} names"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place must not make us wait
    except OSError as error:
        raise InputError(f"{named} cannot be opened: {error.strerror}; make it on every host, with mode 0600") from None
    try:
        found = os.fstat(descriptor)  # of what is open, not of what has the name by now
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{named} is not a regular file; name one with at least {SHORTEST_BYTES} bytes and mode 0600")
        if found.st_uid != os.geteuid():
            raise InputError(f"{named} belongs to user {found.st_uid}, we are {os.geteuid()}; name a file of your own")
        if stat.S_IMODE(found.st_mode) & ~_PRIVATE:
            raise InputError(f"{named} has mode {stat.S_IMODE(found.st_mode):04o}, others may use it; chmod 600 it")
        if found.st_size > LONGEST_BYTES:
            raise InputError(f"{named} has {found.st_size} bytes, at most {LONGEST_BYTES} are valid; is it another file?")
        value = os.read(descriptor, LONGEST_BYTES).strip()
    finally:
        os.close(descriptor)
    _check_length(value, named)
    return value


def _check_length(value: bytes, named: str) -> None:
    if len(value) < SHORTEST_BYTES:
        raise InputError(
            f"{named} has {len(value)} bytes, at least {SHORTEST_BYTES} are needed; `openssl rand -hex 32` prints a good one"
        )
