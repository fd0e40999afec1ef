"""Requests between the keepers of different hosts over TCP: every byte authenticated, nothing encrypted.

Both sides prove that they have the job's secret, then a client asks and a server answers. All numbers are big-endian:

    hello    "LPPEER" | role (1 byte: C or S) | version (1 byte) | nonce (32 random bytes)
    opening  client hello ->   <- server hello   client proof ->   <- server proof
    message  prefix | tag | header | tag | chunk | tag | chunk | tag ...
    prefix   sequence number (8 bytes) | header bytes (4) | data bytes (8)

A proof is HMAC(key, both hellos), a tag HMAC(key, kind (1) | sequence number (8) | index (8) | data bytes (8) | what it
stands behind): kind 0 is the prefix (with data bytes 0), 1 the header, 2 a chunk, up to 1 MiB of data. There are four keys, for
the proof and the tags of each role, made of the secret and both hellos (`Secret.key`): so neither an answer that is sent back
nor a recording of another connection fits. The lengths are authenticated before they are used and capped before memory is
taken; a chunk is verified before the next one is read. The client proves first, so a stranger gets nothing that was computed
from the secret.

What fails is dropped, counted by reason, and ends its connection; the server goes on. Who sits between two hosts can read
all of it, and can cut or delay a connection; it cannot change, repeat or reorder what is taken.
"""

import contextlib
import hmac
import ipaddress
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, VARIABLE, Secret

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]

VERSION = 1
REASONS = ("foreign", "replayed", "oversized", "tampered", "malformed")
LOST = "lost"  # the reason of a PeerError that is the network's fault, or that only the other side knows
CHUNK_BYTES = 1024 * 1024
MOST_HEADER_BYTES = 64 * 1024
# In pieces of 1 MiB and where the processor has SHA instructions, about twice as fast as keyed BLAKE2b, three times as BLAKE2s.
DIGEST = "sha256"

_TAG_BYTES = 32
_HELLO = struct.Struct(">6scB32s")
_PREFIX = struct.Struct(">QIQ")
_PLACE = struct.Struct(">BQQQ")
_MAGIC = b"LPPEER"
_PREFIX_KIND, _HEADER_KIND, _CHUNK_KIND = 0, 1, 2
_DEEPEST = 32  # nested objects in a header; ours have two
_REMEMBERED = 4096  # openings by which a recorded one is told from a stranger's; both are refused
_CLOSING_S = 10.0
_log = logging.getLogger(__name__)


class PeerError(ConnectionError):
    """A connection that ended or never came to be.

    Attributes:
        reason: one of `REASONS`, or `LOST`.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class AnswerError(RuntimeError):
    """The peer took the request and could not do it; the connection goes on."""


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        header: what JSON can say, at most 64 KiB of it.
        data: bytes; on the sending side they must not change before they have been sent.
    """

    header: Mapping[str, Any]
    data: Buffer = b""


@dataclass(frozen=True)
class Handler:
    """What a server does with requests of one name.

    Attributes:
        answer: gets the header and the data, only when all of it has been verified. An exception becomes an `AnswerError`.
        place: gets the header and the number of bytes, and returns the writable buffer of exactly that length that they go
            to. After a failure it holds anything, and ``answer`` is not called. None: fresh memory.
    """

    answer: Callable[[dict[str, Any], memoryview], Answer]
    place: Callable[[dict[str, Any], int], Buffer] | None = None


class PeerServer:
    """Answers peers that have the secret, each connection in a thread of its own, until `close`.

    Args:
        address: IP address or host name of one interface, and port; port 0: the kernel chooses.
        secret: the job's.
        handlers: by the name of the request.
        limit_bytes: the most data that a request may bring.
        timeout_s: for each further MiB of a message, in either direction.
        handshake_timeout_s: until the secret is proven.
        idle_timeout_s: between two messages of a connection.
        most_handshakes: connections that have not proven the secret yet; others wait in the kernel's queue.

    Attributes:
        address: IP address and port that it is bound to.

    Raises:
        InputError: without a secret, for an address that stands for all interfaces, a number that is no port, or a limit below 0.
        OSError: if the address cannot be bound.
    """

    def __init__(
        self,
        address: Address,
        secret: Secret,
        handlers: Mapping[str, Handler],
        limit_bytes: int,
        *,
        timeout_s: float = 30.0,
        handshake_timeout_s: float = 5.0,
        idle_timeout_s: float = 600.0,
        most_handshakes: int = 16,
    ) -> None:
        _check_secret(secret)
        if limit_bytes < 0:
            raise InputError(f"limit_bytes must be 0 or more, got {limit_bytes}; give the size of the largest shard")
        self._secret, self._handlers, self._limit_bytes = secret, dict(handlers), limit_bytes
        self._timeout_s, self._handshake_timeout_s, self._idle_timeout_s = timeout_s, handshake_timeout_s, idle_timeout_s
        self._handshakes = threading.BoundedSemaphore(most_handshakes)
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()
        self._opened: deque[bytes] = deque(maxlen=_REMEMBERED)
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._listener = _listener(address)
        self.address: Address = self._listener.getsockname()[:2]
        self._acceptor = threading.Thread(target=self._accept, name="peer-server", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> "PeerServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def refused(self) -> dict[str, int]:
        """How many messages and openings were dropped, by reason."""
        with self._lock:
            return {reason: self._refused[reason] for reason in REASONS}

    def close(self) -> None:
        """End all connections and threads; a handler at work gets 10 s to return."""
        with self._lock:
            self._closing = True
            connections = dict(self._connections)
        for each in [self._listener, *connections]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        deadline = time.monotonic() + _CLOSING_S
        for thread in {self._acceptor, *connections.values()} - {threading.current_thread()}:  # a handler may close its server
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            if not self._handshakes.acquire(timeout=0.2):
                continue
            try:
                connection, _ = self._listener.accept()
                self._start(connection)
            except (OSError, RuntimeError) as error:
                self._handshakes.release()
                if not (self._closing or isinstance(error, TimeoutError)):
                    time.sleep(0.1)  # no descriptor or no thread left: others may end

    def _start(self, connection: socket.socket) -> None:
        with self._lock:
            try:
                if self._closing:
                    raise ConnectionAbortedError("the server closes")
                thread = threading.Thread(target=self._serve, args=(connection,), name="peer-connection", daemon=True)
                self._connections[connection] = thread
                thread.start()
            except BaseException:
                self._connections.pop(connection, None)
                connection.close()
                raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            try:
                channel = self._open(connection)
            finally:
                self._handshakes.release()
            while self._answer_one(channel):
                pass
        except PeerError as error:
            self._refuse(error)
        except Exception:
            _log.exception("a connection of a peer ended by a defect; the server goes on")
        finally:
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _open(self, connection: socket.socket) -> "_Channel":
        deadline = time.monotonic() + self._handshake_timeout_s
        stranger = "a connection did not open as a peer's"
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        theirs = _take(connection, _HELLO.size, deadline, "foreign", stranger)
        magic, role, version, nonce = _HELLO.unpack(theirs)
        if (magic, role) != (_MAGIC, b"C"):
            raise PeerError("foreign", stranger)
        ours = _HELLO.pack(_MAGIC, b"S", VERSION, secrets.token_bytes(32))
        _give(connection, ours, deadline)  # before the version is judged: so that an older client can say what we speak
        if version != VERSION:
            raise PeerError("foreign", f"a peer speaks version {version}, this is {VERSION}; install the same on all hosts")
        proof = _take(connection, _TAG_BYTES, deadline, "foreign", stranger)
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", theirs + ours)):
            with self._lock:
                reason = "replayed" if nonce in self._opened else "foreign"
            raise PeerError(reason, "a connection did not prove that it has the job's secret")
        with self._lock:
            self._opened.append(nonce)
        _give(connection, _proof(self._secret, b"server", theirs + ours), deadline)
        return _Channel(connection, self._secret, theirs + ours, b"server", b"client", self._timeout_s)

    def _answer_one(self, channel: "_Channel") -> bool:
        message = channel.receive_header(self._idle_timeout_s, self._limit_bytes)
        if message is None:
            return False
        header, data_bytes = message
        name = header.pop("request", None)
        if not isinstance(name, str):
            raise PeerError("malformed", 'the header of a request has no "request" that names it')
        view, error = None, ""
        try:
            view = self._place(name, header, data_bytes)
        except Exception as failure:
            error = _told(name, failure)
        channel.receive_data(view, data_bytes)
        answer, encoded = Answer({}), b""
        if view is not None:
            try:
                answer = self._handlers[name].answer(header, view)
                encoded = _encoded({"answer": answer.header})
            except Exception as failure:
                error = _told(name, failure)
        if error:
            answer, encoded = Answer({}), _encoded({"error": error[:1000]})
        channel.send(encoded, answer.data)
        return True

    def _place(self, name: str, header: dict[str, Any], data_bytes: int) -> memoryview:
        if name not in self._handlers:
            raise InputError(f"there is no request {name!r}; {nearest(name, self._handlers)}")
        place = self._handlers[name].place
        view = _flat(place(header, data_bytes) if place else bytearray(data_bytes))
        if len(view) != data_bytes or view.readonly:
            raise InputError(f"{data_bytes} bytes do not fit the buffer of {len(view)}; send what the request is for")
        return view

    def _refuse(self, error: PeerError) -> None:
        with self._lock:
            if self._closing or error.reason not in REASONS:
                return
            self._refused[error.reason] += 1
            first = self._refused[error.reason] == 1
        # The first of a kind is news; that it goes on is in the count, and must not fill the disk.
        _log.log(logging.WARNING if first else logging.DEBUG, "dropped a peer's message as %s: %s", error.reason, error)


class PeerConnection:
    """A client's connection; made by `open`. One request at a time; a second thread waits. After a `PeerError` it is closed."""

    def __init__(self, channel: "_Channel") -> None:
        self._channel = channel
        self._lock = threading.Lock()

    @classmethod
    def open(cls, address: Address, secret: Secret, timeout_s: float) -> "PeerConnection":
        """Connect, and prove the secret to each other.

        Args:
            address: IP address or host name, and port, of a `PeerServer`.
            secret: the job's.
            timeout_s: until the connection stands; then for each answer to begin, and for each further MiB in either direction.

        Raises:
            InputError: without a secret, or for a number that is no port.
            PeerError: if the peer cannot be reached, or does not have the secret.
        """
        _check_secret(secret)
        _check_port(address, 1)
        peer = f"the peer at {address[0]}:{address[1]}"
        deadline = time.monotonic() + timeout_s
        try:
            connection = socket.create_connection(address, timeout=timeout_s)
        except (OSError, UnicodeError) as error:
            raise PeerError(LOST, f"{peer} cannot be reached: {error}; is its keeper running?") from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ours = _HELLO.pack(_MAGIC, b"C", VERSION, secrets.token_bytes(32))
            _give(connection, ours, deadline)
            theirs = _take(connection, _HELLO.size, deadline, LOST, f"{peer} did not answer as a keeper does")
            magic, role, version, _ = _HELLO.unpack(theirs)
            if (magic, role) != (_MAGIC, b"S"):
                raise PeerError("foreign", f"{peer} does not speak as a keeper does; is another program using the port?")
            if version != VERSION:
                raise PeerError("foreign", f"{peer} speaks version {version}, this is {VERSION}; install the same on all hosts")
            _give(connection, _proof(secret, b"client", ours + theirs), deadline)
            strange = f"{peer} did not prove that it has the job's secret; give all hosts the same"
            proof = _take(connection, _TAG_BYTES, deadline, "foreign", strange)
            if not hmac.compare_digest(proof, _proof(secret, b"server", ours + theirs)):
                raise PeerError("foreign", strange)
            return cls(_Channel(connection, secret, ours + theirs, b"client", b"server", timeout_s))
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> "PeerConnection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.connection.close()

    def request(
        self, name: str, header: Mapping[str, Any] | None = None, data: Buffer = b"", into: Buffer | None = None
    ) -> Answer:
        """Ask, and return the answer when all of it has been verified.

        Args:
            name: of one of the server's handlers.
            header: what JSON can say, at most 64 KiB of it, without the key ``request``.
            data: bytes that must not change meanwhile.
            into: where the answer's data go, at most as many bytes as there are; after a failure it holds anything. None:
                fresh memory, at most 1 MiB.

        Raises:
            InputError: if the header is too long or JSON cannot say it, or ``into`` is read-only; nothing has been sent then.
            AnswerError: if the peer could not do it.
            PeerError: if the connection ended, or the answer was not the peer's or too large.
        """
        encoded = _encoded({**(header or {}), "request": name})
        target = None if into is None else _flat(into)
        if target is not None and len(target) and target.readonly:
            raise InputError(f"into must be writable, got a read-only {type(into).__name__}; give a bytearray or its memoryview")
        limit_bytes = CHUNK_BYTES if target is None else len(target)
        with self._lock:
            try:
                self._channel.send(encoded, data)
                message = self._channel.receive_header(self._channel.timeout_s, limit_bytes)
                if message is None:
                    raise PeerError(
                        LOST, f"the peer ended the connection or was silent for too long during {name!r}; see its log"
                    )
                answer, data_bytes = message
                view = (_flat(bytearray(data_bytes)) if target is None else target)[:data_bytes]
                self._channel.receive_data(view, data_bytes)
                if "error" not in answer and not isinstance(answer.get("answer"), dict):
                    raise PeerError("malformed", f"the header of the answer to {name!r} has neither an answer nor an error")
            except BaseException:
                self.close()  # whatever comes next on it would be out of step
                raise
        if "error" in answer:
            raise AnswerError(f"the peer could not do {name!r}: {answer['error']}")
        return Answer(answer["answer"], view)


class _Channel:
    """Messages of an opened connection, numbered in each direction."""

    def __init__(
        self, connection: socket.socket, secret: Secret, hellos: bytes, ours: bytes, theirs: bytes, timeout_s: float
    ) -> None:
        self.connection = connection
        self.timeout_s = timeout_s
        self._send_key = hmac.new(secret.key(ours + b" messages", hellos), digestmod=DIGEST)
        self._receive_key = hmac.new(secret.key(theirs + b" messages", hellos), digestmod=DIGEST)
        self._sent = self._received = 0

    def send(self, header: bytes, data: Buffer) -> None:
        """Send one message; the data from where they lie."""
        view, number = _flat(data), self._sent
        prefix = _PREFIX.pack(number, len(header), len(view))
        start = prefix + _tag(self._send_key, _PREFIX_KIND, number, 0, 0, prefix)
        start += header + _tag(self._send_key, _HEADER_KIND, number, 0, len(view), header)
        _give(self.connection, start, time.monotonic() + self.timeout_s)
        for index, first in enumerate(range(0, len(view), CHUNK_BYTES)):
            chunk = view[first : first + CHUNK_BYTES]
            tag = _tag(self._send_key, _CHUNK_KIND, number, index, len(view), chunk)
            deadline = time.monotonic() + self.timeout_s
            _give(self.connection, chunk, deadline)
            _give(self.connection, tag, deadline)
        self._sent += 1

    def receive_header(self, idle_timeout_s: float, limit_bytes: int) -> tuple[dict[str, Any], int] | None:
        """Return the header of the next message and how many bytes of data follow, or None if no message comes."""
        start = bytearray(_PREFIX.size + _TAG_BYTES)
        try:
            _fill(self.connection, memoryview(start)[:1], time.monotonic() + idle_timeout_s)
            deadline = time.monotonic() + self.timeout_s
        except (OSError, EOFError):
            return None  # between two messages any end is an orderly one
        start[1:] = _take(self.connection, len(start) - 1, deadline, "malformed", "a message ended within its prefix")
        prefix, tag = bytes(start[: _PREFIX.size]), bytes(start[_PREFIX.size :])
        number, header_bytes, data_bytes = _PREFIX.unpack(prefix)
        if not hmac.compare_digest(tag, _tag(self._receive_key, _PREFIX_KIND, number, 0, 0, prefix)):
            raise PeerError("tampered", "the prefix of a message is not what the peer sent")
        if number != self._received:
            raise PeerError("replayed", f"message {number} came where {self._received} was due")
        if header_bytes > MOST_HEADER_BYTES:
            raise PeerError("oversized", f"a header of {header_bytes} bytes, at most {MOST_HEADER_BYTES} are taken")
        if data_bytes > limit_bytes:
            raise PeerError("oversized", f"data of {data_bytes} bytes, at most {limit_bytes} are taken")
        record = _take(self.connection, header_bytes + _TAG_BYTES, deadline, "malformed", "a message ended within its header")
        header, tag = record[:header_bytes], record[header_bytes:]
        if not hmac.compare_digest(tag, _tag(self._receive_key, _HEADER_KIND, number, 0, data_bytes, header)):
            raise PeerError("tampered", "the header of a message is not what the peer sent")
        return _decoded(header), data_bytes

    def receive_data(self, view: memoryview | None, data_bytes: int) -> None:
        """Take the data of the message whose header came last; None: verify them and let them go."""
        scratch = memoryview(bytearray(min(data_bytes, CHUNK_BYTES))) if view is None else None
        for index, first in enumerate(range(0, data_bytes, CHUNK_BYTES)):
            end = min(first + CHUNK_BYTES, data_bytes)
            chunk = view[first:end] if view is not None else scratch[: end - first]  # type: ignore[index]
            deadline = time.monotonic() + self.timeout_s
            try:
                _fill(self.connection, chunk, deadline)
            except (OSError, EOFError) as error:
                raise PeerError("malformed", f"a message ended within chunk {index} of its data") from error
            tag = _take(self.connection, _TAG_BYTES, deadline, "malformed", f"a message ended behind chunk {index}")
            if not hmac.compare_digest(tag, _tag(self._receive_key, _CHUNK_KIND, self._received, index, data_bytes, chunk)):
                raise PeerError("tampered", f"chunk {index} of {data_bytes} bytes of data is not what the peer sent")
        self._received += 1


def _tag(key: hmac.HMAC, kind: int, number: int, index: int, data_bytes: int, content: Buffer) -> bytes:
    tag = key.copy()
    tag.update(_PLACE.pack(kind, number, index, data_bytes))
    tag.update(content)
    return tag.digest()


def _proof(secret: Secret, role: bytes, hellos: bytes) -> bytes:
    return hmac.digest(secret.key(role + b" proof", hellos), hellos, DIGEST)


def _fill(connection: socket.socket, view: memoryview, deadline: float) -> None:
    """Fill ``view``; the deadline is for all of it, so that a byte now and then does not keep us."""
    taken = 0
    while taken < len(view):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the peer did not send in time")
        connection.settimeout(left_s)
        count = connection.recv_into(view[taken:])
        if count == 0:
            raise EOFError("the peer ended the connection")
        taken += count


def _take(connection: socket.socket, count: int, deadline: float, reason: str, sentence: str) -> bytes:
    taken = bytearray(count)
    try:
        _fill(connection, memoryview(taken), deadline)
    except (OSError, EOFError) as error:
        raise PeerError(reason, f"{sentence} ({error})") from error
    return bytes(taken)


def _give(connection: socket.socket, content: Buffer, deadline: float) -> None:
    try:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))  # 0 would mean: do not wait at all
        connection.sendall(content)
    except OSError as error:
        raise PeerError(
            LOST, f"the connection to a peer ended while we sent ({error}); its log says whether it refused"
        ) from error


def _flat(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(bytearray())  # a view of nothing cannot be cast


def _encoded(header: Mapping[str, Any]) -> bytes:
    try:
        encoded = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"a header must be what JSON can say: {error}; send arrays and bytes as data") from None
    if len(encoded) > MOST_HEADER_BYTES:
        raise InputError(f"a header of {len(encoded)} bytes, at most {MOST_HEADER_BYTES} are taken; send the rest as data")
    return encoded


def _decoded(encoded: bytes) -> dict[str, Any]:
    try:
        header = json.loads(encoded.decode(), parse_constant=_no_constant)
        if isinstance(header, dict) and _is_flat_enough(header, _DEEPEST):
            return header
    except (ValueError, RecursionError):
        pass
    raise PeerError("malformed", f"a header is not a JSON object, or is nested deeper than {_DEEPEST}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_flat_enough(value: object, left: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    return left > 0 and all(_is_flat_enough(each, left - 1) for each in (value.values() if isinstance(value, dict) else value))


def _told(name: str, failure: Exception) -> str:
    """Return what the peer is told of a failure: the sentence if it can mend it, else only what kind of defect it is."""
    if isinstance(failure, InputError):
        return str(failure)
    _log.error("the handler of %r failed", name, exc_info=failure)
    return f"its handler failed with {type(failure).__name__}; the log there says where"


def _check_secret(secret: object) -> None:
    if not isinstance(secret, Secret):
        raise InputError(f"peers need the job's secret, got {type(secret).__name__}; set {FILE_VARIABLE} or {VARIABLE}")


def _check_port(address: Address, lowest: int) -> None:
    if not lowest <= address[1] <= 65535:  # the resolver would take the lowest 16 bits of it
        raise InputError(f"a peer's port must be {lowest} to 65535, got {address[1]}; a server's `address` says the one it has")


def _listener(address: Address) -> socket.socket:
    """Bind to one address, resolved before it is judged: a name, or ``0``, can stand for all interfaces too."""
    _check_port(address, 0)
    host, port = address
    valid = "give the address of the process group's interface"
    if not host:
        raise InputError(f"a peer server cannot bind to {host!r}, which is every interface; {valid}")
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise InputError(f"a peer server cannot bind to {host!r}, port {port}: {error}; {valid}") from None
    ip = ipaddress.ip_address(str(resolved[0]).partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    if mapped.is_unspecified or mapped.is_multicast or str(mapped) == "255.255.255.255":
        raise InputError(f"a peer server cannot bind to {host!r}, which is not one interface; {valid}")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(resolved)
        listener.listen(128)
        listener.settimeout(0.5)  # where a shutdown does not wake accept
    except BaseException:
        listener.close()
        raise
    return listener
