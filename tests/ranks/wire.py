"""Messages between test, supervisor and ranks: pickles behind an 8-byte length, over Unix sockets of our own.

A message cut short by a kill is dropped whole, never half read.
"""

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 1 << 20


def pack(message: Any) -> bytes:
    """Return one message as it travels."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


class Channel:
    """Both ends' view of a stream socket that never blocks: what cannot be sent yet waits in ``unsent``.

    Attributes:
        unsent: bytes that the socket has not taken yet.
        closed: whether the other end is gone; messages that arrived whole before that are still received.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.unsent = bytearray()
        self.closed = False
        self._unread = bytearray()

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Any) -> None:
        """Queue a message, and send as much as the socket takes now."""
        self.unsent += pack(message)
        self.flush()

    def flush(self) -> None:
        """Send as much as the socket takes now."""
        try:
            while self.unsent:
                del self.unsent[: self.socket.send(memoryview(self.unsent)[:_CHUNK_BYTES].tobytes())]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()
            self.closed = True

    def receive(self) -> list[Any]:
        """Return the messages that have arrived whole since the last call."""
        try:
            while data := self.socket.recv(_CHUNK_BYTES):
                self._unread += data
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        messages = []
        while len(self._unread) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._unread)[0]
            if len(self._unread) < end:
                break
            messages.append(pickle.loads(bytes(self._unread[_LENGTH.size : end])))
            del self._unread[:end]
        return messages
