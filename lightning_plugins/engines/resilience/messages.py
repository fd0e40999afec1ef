"""Messages between the keeper and its clients over a Unix socket: a length of 4 bytes, then JSON; descriptors beside it.

Lengths are checked before memory is taken. Nothing that arrives is code.
"""

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

PROTOCOL = 1
MAX_BYTES = 16 << 20
MESSAGE_S = 10.0  # for all of a message, once its first byte is there
_LENGTH = struct.Struct("!I")
_MAX_DESCRIPTORS = 4


class MalformedError(ValueError):
    """A message that is not one.

    Attributes:
        resumable: whether the next message can be found behind it.
    """

    def __init__(self, reason: str, resumable: bool) -> None:
        super().__init__(reason)
        self.resumable = resumable


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message whole.

    Raises:
        ValueError: if it is longer than 16 MiB.
        OSError: if the other side has gone, or takes nothing for as long as the socket's timeout.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body)} bytes was to be sent; at most {MAX_BYTES} are allowed")
    data = _LENGTH.pack(len(body)) + body
    sent = 0
    if descriptors:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        sent = connection.sendmsg([data], [rights])
    connection.sendall(memoryview(data)[sent:])


def receive(connection: socket.socket, wait_s: float | None) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message and the descriptors that came with it, or None if the other side has closed.

    Args:
        connection: its timeout is changed.
        wait_s: how long to wait for the first byte; None is for ever.

    Raises:
        MalformedError: if what arrives is no message of at most 16 MiB with a JSON object in it.
        TimeoutError: if nothing has come after ``wait_s``, or the rest has not ``MESSAGE_S`` later.
        ConnectionError: if the other side has gone in the middle.
    """
    connection.settimeout(wait_s)
    space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    start, ancillary, _, _ = connection.recvmsg(_LENGTH.size, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = _descriptors(ancillary)
    try:
        if not start:
            return None
        connection.settimeout(MESSAGE_S)
        (length,) = _LENGTH.unpack(start + _exactly(connection, _LENGTH.size - len(start)))
        if length > MAX_BYTES:
            raise MalformedError(f"a message of {length} bytes was announced; at most {MAX_BYTES} are allowed", resumable=False)
        try:
            message = json.loads(_exactly(connection, length))
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"a message is not JSON: {error}", resumable=True) from error
        if not isinstance(message, dict):
            raise MalformedError("a message is no JSON object", resumable=True)
    except BaseException:
        close_all(descriptors)
        raise
    return message, descriptors


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def peer_uid(connection: socket.socket) -> int:
    """Return the user at the other end, as the kernel knows it."""
    credentials = struct.Struct("3i")
    _, uid, _ = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(uid)


def _exactly(connection: socket.socket, length: int) -> bytes:
    """Receive as many bytes as that; memory grows with what arrives, not with what was announced."""
    parts = []
    while length:
        part = connection.recv(min(length, 1 << 16))
        if not part:
            raise ConnectionError("the other side has gone in the middle of a message")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)
