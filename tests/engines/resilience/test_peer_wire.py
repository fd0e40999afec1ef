"""The peers' protocol over real sockets: against a second writing of it, bit by bit, and what strangers and faults get.

`Raw` is the oracle: the protocol of the module's header in plain socket, struct and hmac calls, which shares no code with what
is tested, sends whatever it is told to, and records and flips what it sends.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import os
import random
import socket
import struct
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.peer_wire import Answer, AnswerError, Handler, PeerConnection, PeerError, PeerServer
from lightning_plugins.engines.resilience.secret import Secret
from tests.ranks import linux
from tests.ranks.proxy import Faults, Proxy

VALUE = b"a secret of the wire's tests 4711"
SECRET = Secret(VALUE)
LIMIT_BYTES = 64 * 2**20
MIB = 2**20
OPENING_BYTES = 40 + 32  # hello and proof
told = []  # what the tests' exceptions say, with their tracebacks


@pytest.fixture(autouse=True)
def nothing_left_nothing_told(caplog):
    """No thread, no descriptor, and the secret in no log record and no exception."""
    caplog.set_level(logging.DEBUG)
    told.clear()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 3.0
    while (
        names := [each.name for each in threading.enumerate() if each.name.startswith("peer")]
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not names
    assert len(os.listdir("/proc/self/fd")) == descriptors
    records = caplog.get_records("call")  # by now caplog.text is that of the teardown
    said = "".join(map(logging.Formatter().format, records)) + repr([record.__dict__ for record in records]) + "".join(told)
    for shown in [VALUE.decode(), VALUE.decode()[2:12], VALUE.hex(), base64.b64encode(VALUE).decode(), repr(list(VALUE))]:
        assert shown not in said


@contextlib.contextmanager
def raises(kind, reason=None, match=""):
    with pytest.raises(kind, match=match or None) as caught:
        yield
    told.append("".join(traceback.format_exception(caught.value)) + repr(caught.value))
    if reason is not None:
        assert caught.value.reason == reason


class Served:
    """A server whose handlers keep what they get."""

    def __init__(self, address="127.0.0.1", **settings):
        self.delivered = []
        self.placed = 0
        self.blob = random.Random(0).randbytes(3 * MIB + 17)
        handlers = {
            "store": Handler(self.store, self.place),
            "fetch": Handler(lambda header, data: Answer({"of": len(self.blob)}, memoryview(self.blob)[: header["bytes"]])),
            "echo": Handler(lambda header, data: Answer(header, data)),
            "defect": Handler(lambda header, data: {}[VALUE.decode()[:3]]),
            "refuse": Handler(lambda header, data: (_ for _ in ()).throw(InputError("no such step; ask for step 3"))),
            "narrow": Handler(self.store, lambda header, data_bytes: bytearray(data_bytes - 1)),
            "constant": Handler(self.store, lambda header, data_bytes: bytes(data_bytes)),
        }
        self.server = PeerServer((address, 0), SECRET, handlers, LIMIT_BYTES, **{"timeout_s": 10.0, **settings})
        self.address = self.server.address

    def place(self, header, data_bytes):
        self.placed += 1
        self.buffer = bytearray(data_bytes)
        return self.buffer

    def store(self, header, data):
        self.delivered.append((header, bytes(data)))
        return Answer({"bytes": len(data)})

    def refused(self, **expected):
        """Check the counts, and that the server still serves; what has been delivered since is the caller's to look at."""
        assert {reason: count for reason, count in self.server.refused.items() if count} == expected
        before = list(self.delivered)
        with PeerConnection.open(self.address, SECRET, 10.0) as connection:
            assert connection.request("store", {"n": 1}, b"after").header == {"bytes": 5}
        assert self.delivered.pop() == ({"n": 1}, b"after")
        assert self.delivered == before

    def raw(self, **options):
        return Raw(socket.create_connection(self.address, timeout=10), **options)


@pytest.fixture
def served():
    with contextlib.ExitStack() as stack:

        def make(**settings):
            made = Served(**settings)
            stack.callback(made.server.close)
            return made

        yield make


class Raw:
    """One end of a connection; ``flip`` is the one bit that goes out wrong, ``cut`` the number of bytes that go out at all."""

    def __init__(self, connection, value=VALUE, flip=None, cut=None):
        self.socket, self.value, self.flip, self.cut = connection, value, flip, cut
        self.sent = b""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.socket.close()

    def give(self, data):
        position = None if self.flip is None else self.flip // 8 - len(self.sent)
        self.sent += data
        if position is not None and 0 <= position < len(data):
            data = bytearray(data)
            data[position] ^= 1 << self.flip % 8
        if self.cut is not None and len(self.sent) > self.cut:
            data = data[: max(0, self.cut - len(self.sent) + len(data))]
        self.socket.sendall(data)
        if self.cut is not None and len(self.sent) >= self.cut:
            self.socket.shutdown(socket.SHUT_WR)

    def take(self, count):
        taken = b""
        while len(taken) < count:
            piece = self.socket.recv(count - len(taken))
            if not piece:
                raise EOFError(f"{len(taken)} of {count} bytes")
            taken += piece
        return taken

    def ended(self):
        """Wait until the other side has ended the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(65536):
                pass

    def hello(self, role, version=1):
        return b"LPPEER" + role + bytes([version]) + os.urandom(32)

    def key(self, purpose):
        extracted = hmac.new(self.hellos, self.value, hashlib.sha256).digest()
        return hmac.new(extracted, purpose + b"\x01", hashlib.sha256).digest()

    def open(self, version=1):
        mine = self.hello(b"C", version)
        self.give(mine)
        self.hellos = mine + self.take(40)
        self.give(hmac.new(self.key(b"client proof"), self.hellos, hashlib.sha256).digest())
        proof = self.take(32)
        assert proof == hmac.new(self.key(b"server proof"), self.hellos, hashlib.sha256).digest()
        self.keys = self.key(b"client messages"), self.key(b"server messages")
        return self

    def accept(self):
        theirs = self.take(40)
        mine = self.hello(b"S")
        self.hellos = theirs + mine
        self.give(mine)
        self.client_proof = self.take(32)
        self.give(hmac.new(self.key(b"server proof"), self.hellos, hashlib.sha256).digest())
        self.keys = self.key(b"server messages"), self.key(b"client messages")
        return self

    def tag(self, key, kind, number, index, data_bytes, content):
        return hmac.new(key, struct.pack(">BQQQ", kind, number, index, data_bytes) + content, hashlib.sha256).digest()

    def parts(self, number, header, data=b"", data_bytes=None, header_bytes=None):
        """Return prefix, header and chunks of a message, each with its tag."""
        data_bytes = len(data) if data_bytes is None else data_bytes
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        prefix = struct.pack(">QIQ", number, len(header) if header_bytes is None else header_bytes, data_bytes)
        parts = [prefix + self.tag(self.keys[0], 0, number, 0, 0, prefix)]
        parts.append(header + self.tag(self.keys[0], 1, number, 0, data_bytes, header))
        for index in range(-(-len(data) // MIB)):
            chunk = data[index * MIB : (index + 1) * MIB]
            parts.append(chunk + self.tag(self.keys[0], 2, number, index, data_bytes, chunk))
        return parts

    def message(self, *args, **kwargs):
        return b"".join(self.parts(*args, **kwargs))

    def read(self, number):
        """Return all bytes, the header and the data of a message."""
        prefix = self.take(52)
        assert prefix[20:] == self.tag(self.keys[1], 0, number, 0, 0, prefix[:20])
        stated, header_bytes, data_bytes = struct.unpack(">QIQ", prefix[:20])
        assert stated == number
        header = self.take(header_bytes + 32)
        assert header[header_bytes:] == self.tag(self.keys[1], 1, number, 0, data_bytes, header[:header_bytes])
        whole, data = prefix + header, b""
        for index in range(-(-data_bytes // MIB)):
            size = min(MIB, data_bytes - index * MIB)
            chunk = self.take(size + 32)
            assert chunk[size:] == self.tag(self.keys[1], 2, number, index, data_bytes, chunk[:size])
            whole, data = whole + chunk, data + chunk[:size]
        return whole, json.loads(header[:header_bytes]), data


@contextlib.contextmanager
def raw_server(serve):
    """Run ``serve(Raw)`` for one connection; yield the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        connection, _ = listener.accept()
        connection.settimeout(10)
        with connection, contextlib.suppress(OSError, EOFError):
            serve(connection)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        thread.join()
        listener.close()


STORE = {"request": "store", "n": 1}


# What is right


def test_the_server_speaks_as_written(served):
    there = served()
    data = random.Random(1).randbytes(2 * MIB + 5)
    with there.raw() as raw:
        raw.open()
        for number in range(3):
            raw.give(raw.message(number, {"request": "echo", "n": number}, data))
            assert raw.read(number)[1:] == ({"answer": {"n": number}}, data)
        raw.give(raw.message(3, {"request": "unheard"}, data))
        assert "error" in raw.read(3)[1]
    there.refused()


def test_the_client_speaks_as_written():
    seen = []

    def serve(connection):
        raw = Raw(connection).accept()
        assert raw.client_proof == hmac.new(raw.key(b"client proof"), raw.hellos, hashlib.sha256).digest()
        for number in range(2):
            _, header, data = raw.read(number)
            seen.append((header, data))
            raw.give(raw.message(number, {"answer": {"n": number}}, data[::-1]))

    with raw_server(serve) as address, PeerConnection.open(address, SECRET, 10.0) as connection:
        for number, data in enumerate([b"abc", b""]):
            answer = connection.request("turn", {"of": 3}, data)
            assert (answer.header, bytes(answer.data)) == ({"n": number}, data[::-1])
    assert seen == [({"of": 3, "request": "turn"}, b"abc"), ({"of": 3, "request": "turn"}, b"")]


def test_64_mib_there_and_back_are_right_to_the_bit(served):
    there = served()
    data = random.Random(2).randbytes(LIMIT_BYTES)
    into = bytearray(LIMIT_BYTES)
    with PeerConnection.open(there.address, SECRET, 10.0) as connection:
        connection.request("store", {}, memoryview(data))
        assert there.buffer == data  # in the very buffer that was given
        there.blob = data
        answer = connection.request("fetch", {"bytes": LIMIT_BYTES}, into=into)
        assert into == data
        assert answer.data.obj is into
    there.delivered.clear()
    there.refused()


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB])
def test_sizes_around_a_chunk(served, size):
    there = served()
    data = random.Random(size).randbytes(size)
    with PeerConnection.open(there.address, SECRET, 10.0) as connection:
        connection.request("store", {}, data)
        answer = connection.request("fetch", {"bytes": size}, into=bytearray(3 * MIB))
    assert there.delivered == [({}, data)]
    assert answer.data == there.blob[:size]


def test_several_clients_in_both_directions_at_once(served):
    there = served()

    def work(number):
        data = random.Random(number).randbytes(2 * MIB + number)
        with PeerConnection.open(there.address, SECRET, 10.0) as connection:
            for _ in range(4):
                answer = connection.request("echo", {"n": number}, data, into=bytearray(3 * MIB))
                assert (answer.header, answer.data) == ({"n": number}, data)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    there.refused()


def test_threads_can_share_a_connection(served):
    there = served()
    with PeerConnection.open(there.address, SECRET, 10.0) as connection, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: connection.request("echo", {"n": number}, b"x" * number), range(200))
        assert [(each.header["n"], len(each.data)) for each in answers] == [(n, n) for n in range(200)]


def test_what_a_handler_cannot_do_ends_no_connection(served, caplog):
    there = served()
    with PeerConnection.open(there.address, SECRET, 10.0) as connection:
        for name, said in [
            ("refuse", "ask for step 3"),
            ("defect", "failed with KeyError; the log there says where$"),
            ("stoer", "did you mean store"),
            ("narrow", "do not fit"),
            ("constant", "do not fit"),
        ]:
            with raises(AnswerError, match=said):
                connection.request(name, {}, bytes(2 * MIB))
        assert connection.request("echo", {"n": 2}).header == {"n": 2}
    assert "KeyError" in caplog.text  # the traceback is for our log, its words are not for the peer
    assert not there.delivered
    there.refused()


def test_what_a_client_cannot_say_is_not_sent(served):
    there = served()
    with PeerConnection.open(there.address, SECRET, 10.0) as connection:
        for header in [{"n": float("nan")}, {"n": b"bytes"}, {"n": "x" * 64 * 1024}]:
            with raises(InputError, match="as data"):
                connection.request("echo", header)
        with raises(InputError, match="writable"):
            connection.request("echo", into=b"constant")
        longest = {"request": "echo", "n": ""}
        room = 64 * 1024 - len(json.dumps(longest, separators=(",", ":")))
        with raises(InputError, match="as data"):
            connection.request("echo", {"n": "x" * (room + 1)})
        assert connection.request("echo", {"n": "x" * room}).header["n"] == "x" * room
    there.refused()


# What is refused


def test_another_secret(served):
    there = served()
    with raises(PeerError, "foreign", "give all hosts the same"):
        PeerConnection.open(there.address, Secret(b"another secret, 0123456789"), 10.0)
    there.refused(foreign=1)


@pytest.mark.parametrize(
    "noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"LPPEER", bytes(40), os.urandom(200), b"LPPEERS\x01" + bytes(64)]
)
def test_no_secret(served, noise):
    there = served(handshake_timeout_s=0.5)
    with there.raw() as raw:
        raw.give(noise)
        with contextlib.suppress(OSError):  # it may have been ended by then
            raw.socket.shutdown(socket.SHUT_WR)
        raw.ended()
    there.refused(foreign=1)


def test_another_version_is_named(served):
    there = served()
    with there.raw() as raw:
        raw.give(raw.hello(b"C", version=2))
        assert raw.take(8) == b"LPPEERS\x01"
        raw.ended()
    with there.raw() as raw, raises((EOFError, ConnectionError)):  # a right proof does not help
        raw.open(version=2)
    there.refused(foreign=2)

    with (
        raw_server(lambda connection: (Raw(connection).give(Raw(None).hello(b"S", version=2)), connection.recv(40))) as address,
        raises(PeerError, "foreign", "speaks version 2, this is 1"),
    ):
        PeerConnection.open(address, SECRET, 10.0)


def test_a_reflected_opening():
    def echo(connection):
        while data := connection.recv(4096):
            connection.sendall(data)

    def echo_as_server(connection):
        hello = Raw(connection).take(40)
        connection.sendall(hello[:6] + b"S" + hello[7:])
        echo(connection)

    for serve in [echo, echo_as_server]:
        with raw_server(serve) as address, raises(PeerError, "foreign"):
            PeerConnection.open(address, SECRET, 10.0)


def test_reflected_messages(served):
    there = served()
    with there.raw() as raw:
        raw.open()
        raw.give(raw.message(0, {"request": "echo", "n": 1}))
        raw.give(raw.read(0)[0])
        raw.ended()
    there.refused(tampered=1)

    def serve(connection):
        raw = Raw(connection).accept()
        raw.give(raw.read(0)[0])

    with raw_server(serve) as address, PeerConnection.open(address, SECRET, 10.0) as connection, raises(PeerError, "tampered"):
        connection.request("echo")


def test_a_recorded_session(served):
    there, other = served(), served()
    with there.raw() as raw:
        raw.open().give(raw.message(0, STORE, b"once"))
        raw.read(0)
    for server, counted in [(there, {"replayed": 1}), (other, {"foreign": 1})]:  # another server cannot know whose it was
        with server.raw() as again:
            again.give(raw.sent)
            again.ended()
        server.refused(**counted)
    assert there.delivered == [({"n": 1}, b"once")]
    assert not other.delivered


def test_a_repeated_message(served):
    there = served()
    with there.raw() as raw:
        message = raw.open().message(0, STORE, b"once")
        raw.give(message + message)
        raw.ended()
    there.refused(replayed=1)
    assert there.delivered == [({"n": 1}, b"once")]


def test_messages_in_another_order(served):
    there = served()
    with there.raw() as raw:
        raw.open().give(raw.message(1, STORE, b"second") + raw.message(0, STORE, b"first"))
        raw.ended()
    there.refused(replayed=1)
    assert not there.delivered


def test_a_message_of_another_connection(served):
    there = served()
    with there.raw() as one, there.raw() as other:
        one.open()
        other.open().give(one.message(0, STORE, b"x"))
        other.ended()
    there.refused(tampered=1)
    assert not there.delivered


@pytest.mark.parametrize("fault", ["swapped", "repeated", "stale", "bit", "of another length"])
def test_chunks_out_of_place_end_the_message_at_once(served, fault):
    there = served()
    data = random.Random(3).randbytes(8 * MIB)
    with there.raw() as raw:
        raw.open()
        raw.give(raw.message(0, STORE, bytes(8 * MIB)))
        raw.read(0)
        prefix, header, *chunks = raw.parts(1, STORE, data)
        bad = {
            "swapped": chunks[2],
            "repeated": chunks[0],
            "stale": raw.parts(0, STORE, bytes(8 * MIB))[3],
            "bit": bytes([chunks[1][0] ^ 1]) + chunks[1][1:],
            "of another length": raw.parts(1, STORE, data[:-1])[3],
        }[fault]
        raw.give(prefix + header + chunks[0] + bad)  # six more would follow, and none is waited for
        raw.ended()
    assert there.delivered == [({"n": 1}, bytes(8 * MIB))]
    there.refused(tampered=1)


def test_one_flipped_bit_anywhere_towards_the_server(served):
    there = served()
    with there.raw() as raw:
        raw.open().give(raw.message(0, STORE, b"0123456789"))
        raw.read(0)
    there.delivered.clear()
    generator, expected = random.Random(4), {"foreign": 0, "tampered": 0}
    for byte in range(len(raw.sent)):
        for bit in generator.sample(range(8), 2):
            with there.raw(flip=8 * byte + bit) as flipped, contextlib.suppress(OSError, EOFError):
                flipped.open()
                flipped.give(flipped.message(0, STORE, b"0123456789"))
                flipped.ended()
            expected["foreign" if byte < OPENING_BYTES else "tampered"] += 1
            assert there.server.refused == {"replayed": 0, "oversized": 0, "malformed": 0, **expected}, f"byte {byte}, bit {bit}"
    assert not there.delivered
    there.refused(**expected)


def test_one_flipped_bit_anywhere_towards_the_client():
    def serve(connection):
        raw = Raw(connection, flip=flip).accept()
        raw.read(0)
        raw.give(raw.message(0, {"answer": {"n": 1}}, b"0123456789"))
        lengths.append(len(raw.sent))

    def ask():
        with raw_server(serve) as address, PeerConnection.open(address, SECRET, 10.0) as connection:
            return connection.request("fetch")

    flip, lengths = None, []
    assert ask().data == b"0123456789"
    generator = random.Random(5)
    for byte in range(lengths[0]):
        flip = 8 * byte + generator.randrange(8)
        with raises(PeerError, "foreign" if byte < OPENING_BYTES else "tampered"):
            ask()


def test_cut_anywhere(served):
    there = served()
    data = b"0123456789"
    with there.raw() as raw:
        opening = len(raw.open().sent)
        raw.give(raw.message(0, STORE, data))
        raw.read(0)
        whole = len(raw.sent)
    there.delivered.clear()
    expected = {"foreign": 0, "malformed": 0}
    for length in range(whole):
        with there.raw(cut=length) as raw, contextlib.suppress(OSError, EOFError):
            raw.open().give(raw.message(0, STORE, data))
            raw.ended()
        if length != opening:  # that is no message at all
            expected["foreign" if length < opening else "malformed"] += 1
        deadline = time.monotonic() + 3.0
        while there.server.refused != {"replayed": 0, "oversized": 0, "tampered": 0, **expected} and time.monotonic() < deadline:
            time.sleep(0.001)
    there.refused(**expected)
    assert not there.delivered


@pytest.mark.parametrize(
    "lengths",
    [{"data_bytes": LIMIT_BYTES + 1}, {"data_bytes": 2**64 - 1}, {"header_bytes": 64 * 1024 + 1}, {"header_bytes": 2**32 - 1}],
)
def test_oversized(served, lengths):
    there = served()
    with there.raw() as raw:
        raw.open().give(raw.parts(0, STORE, **lengths)[0])
        raw.ended()
    assert not there.placed
    there.refused(oversized=1)


def test_an_answer_that_does_not_fit(served):
    there = served()
    for into, size in [(bytearray(MIB), MIB + 1), (bytearray(0), 1), (None, MIB + 1)]:
        with PeerConnection.open(there.address, SECRET, 10.0) as connection:
            with raises(PeerError, "oversized"):
                connection.request("fetch", {"bytes": size}, into=into)
            with raises(PeerError, "lost"):
                connection.request("echo")  # what would come is out of step
    there.refused()


MALFORMED = {
    "empty": b"",
    "no JSON": b"request=store",
    "no UTF-8": b'{"request": "store", "a": "\xff"}',
    "UTF-16": json.dumps(STORE).encode("utf-16"),
    "array": b'["store"]',
    "text": b'"store"',
    "no number": b'{"request": "store", "a": NaN}',
    "long number": b'{"request": "store", "a": ' + b"1" * 60000 + b"}",
    "nested arrays": b'{"request": "store", "a": ' + b"[" * 30000 + b"]" * 30000 + b"}",
    "open arrays": b"[" * 65000,
    "nested objects": b'{"request": "store", "a": ' + b'{"a":' * 10000 + b"1" + b"}" * 10001,
    "33 levels": b'{"request": "store", "a": ' + b"[" * 32 + b"]" * 32 + b"}",
    "no name": b'{"a": 1}',
    "a name that is none": b'{"request": ["store"]}',
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED)
def test_malformed_headers(served, header):
    there = served()
    with there.raw() as raw:
        raw.open().give(raw.message(0, header, b"x"))
        raw.ended()
    assert not there.placed
    there.refused(malformed=1)


@pytest.mark.parametrize("header", [b"[]", b"{}", {"answer": 1}, {"answer": []}, b"no JSON"])
def test_malformed_answers(header):
    def serve(connection):
        raw = Raw(connection).accept()
        raw.read(0)
        raw.give(raw.message(0, header))

    with raw_server(serve) as address, PeerConnection.open(address, SECRET, 10.0) as connection, raises(PeerError, "malformed"):
        connection.request("echo")


def test_a_header_of_32_levels_is_taken(served):
    there = served()
    with there.raw() as raw:
        raw.open().give(raw.message(0, b'{"request": "store", "a": ' + b"[" * 31 + b"]" * 31 + b"}"))
        assert raw.read(0)[1] == {"answer": {"bytes": 0}}
    assert there.delivered.pop()[0].keys() == {"a"}
    there.refused()


# Time, threads, addresses


def test_silent_and_slow_strangers_are_ended_and_never_many(served):
    there = served(handshake_timeout_s=1.0, most_handshakes=3)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(there.raw()) for _ in range(3)]
        slow = stack.enter_context(there.raw())
        many = set()
        while time.monotonic() - started < 0.5:
            many.add(sum(each.name == "peer-connection" for each in threading.enumerate()))
            time.sleep(0.01)
        assert max(many) == 3
        with PeerConnection.open(there.address, SECRET, 10.0) as connection:  # waits its turn in the kernel's queue
            connection.request("echo")
        for each in silent:
            each.ended()
        with contextlib.suppress(OSError):
            for _ in range(200):
                slow.give(b"L")
                time.sleep(0.05)
        assert time.monotonic() - started < 8.0
    there.refused(foreign=4)


def test_a_message_that_does_not_go_on_is_ended(served):
    there = served(timeout_s=0.3)
    for part in range(3):
        with there.raw() as raw:
            parts = raw.open().parts(0, STORE, bytes(10))
            raw.give(b"".join(parts[:part]) + parts[part][:-1])
            raw.ended()
    assert not there.delivered
    there.refused(malformed=3)


def test_an_idle_connection_is_ended_and_not_counted(served):
    there = served(idle_timeout_s=0.2)
    with there.raw() as raw:
        raw.open().ended()
    there.refused()


def test_closing_ends_everything_at_once(served):
    there = served()
    with contextlib.ExitStack() as stack:
        stack.enter_context(there.raw())
        connections = [stack.enter_context(PeerConnection.open(there.address, SECRET, 10.0)) for _ in range(3)]
        began = time.monotonic()
        there.server.close()
        there.server.close()
        assert time.monotonic() - began < 2.0
        assert not [each for each in threading.enumerate() if each.name.startswith("peer")]
        for each in connections:
            with raises(PeerError, "lost"):
                each.request("echo")
        with raises(PeerError, "lost", "cannot be reached"):
            PeerConnection.open(there.address, SECRET, 1.0)
    assert not any(there.server.refused.values())


def test_a_silent_peer_costs_the_time_that_was_given():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with raises(PeerError, "lost", "did not answer"):
            PeerConnection.open(listener.getsockname(), SECRET, 0.3)
        assert 0.3 <= time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "host", ["", "0.0.0.0", "0", "0x0", "0.0", "::", "::0", "::ffff:0.0.0.0", "224.0.0.1", "255.255.255.255", "no such host"]
)
def test_only_one_interface_can_be_bound_to(host):
    with raises(InputError, match="cannot bind to.*give the address of the process group's interface"):
        PeerServer((host, 0), SECRET, {}, 0)


def test_an_empty_address_is_named():
    with raises(InputError, match="'', which is every interface"):
        PeerServer(("", 0), SECRET, {}, 0)


def test_ports_and_names_that_are_none_or_taken(served):
    for port in [-1, 65536, 70000]:
        with raises(InputError, match=f"0 to 65535, got {port}"):
            PeerServer(("127.0.0.1", port), SECRET, {}, 0)
    for port in [-1, 0, 65536]:
        with raises(InputError, match=f"1 to 65535, got {port}"):
            PeerConnection.open(("127.0.0.1", port), SECRET, 1.0)
    with raises(PeerError, "lost", "cannot be reached"):
        PeerConnection.open(("x" * 70 + ".invalid", 1), SECRET, 1.0)
    with raises(OSError, match="in use"):
        PeerServer(served().address, SECRET, {}, 0)


def test_a_name_is_resolved(served):
    assert served(address="localhost").address[0] in ("127.0.0.1", "::1")


def test_it_listens_on_that_address_only(served):
    there = served()
    assert there.address[0] == "127.0.0.1"
    with raises(PeerError, "lost"):
        PeerConnection.open(("127.0.0.2", there.address[1]), SECRET, 1.0)


@pytest.mark.parametrize("secret", [None, VALUE, ""])
def test_nothing_listens_or_connects_without_a_secret(secret):
    with raises(InputError, match="LIGHTNING_PLUGINS_JOB_SECRET_FILE"):
        PeerServer(("127.0.0.1", 0), secret, {}, 0)
    with raises(InputError, match="LIGHTNING_PLUGINS_JOB_SECRET_FILE"):
        PeerConnection.open(("127.0.0.1", 9), secret, 1.0)


def test_a_negative_limit_is_refused():
    with raises(InputError, match="got -1"):
        PeerServer(("127.0.0.1", 0), SECRET, {}, -1)


# Between hosts


def inside(host, function):
    """Run it in a thread that stands in the host's network; its threads and sockets stay there."""

    def run():
        linux.enter_network_namespace(host.name)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.netns
def test_faults_of_the_wire_between_hosts(hosts):
    pair = hosts(2).hosts
    there = inside(pair[0], lambda: Served(pair[0].address, timeout_s=10.0))
    data = random.Random(6).randbytes(3 * MIB)

    def exchange(proxy):
        with PeerConnection.open((proxy.address, proxy.port), SECRET, 10.0) as connection:
            connection.request("store", {"n": 1}, data)
            assert connection.request("fetch", {"bytes": 3 * MIB}, into=bytearray(3 * MIB)).data == there.blob[: 3 * MIB]

    counts = {"foreign": 0, "tampered": 0, "malformed": 0}
    try:
        with Proxy(there.address, host=pair[0]) as proxy:
            inside(pair[1], lambda: exchange(proxy))
            proxy.set(Faults(delay_s=0.02))
            inside(pair[1], lambda: exchange(proxy))
            there.delivered.clear()
            for reason, fault in [
                ("foreign", {"corrupt_byte": 30}),
                ("foreign", {"corrupt_byte": 60}),
                ("tampered", {"corrupt_byte": 90}),
                ("tampered", {"corrupt_byte": 130}),
                ("tampered", {"corrupt_byte": 2 * MIB + MIB // 2}),
                ("foreign", {"truncate_after_bytes": 50}),
                ("malformed", {"truncate_after_bytes": 80}),
                ("malformed", {"truncate_after_bytes": 2 * MIB}),
                ("malformed", {"drop_after_bytes": 2 * MIB}),
            ]:
                proxy.set(Faults(direction="to_target", **fault))
                with raises(PeerError):
                    inside(pair[1], lambda: exchange(proxy))
                counts[reason] += 1
                deadline = time.monotonic() + 3.0  # a reset reaches the two ends in any order
                while there.server.refused[reason] < counts[reason] and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert there.server.refused == {"replayed": 0, "oversized": 0, **counts}, fault
                assert not there.delivered
            for reason, byte in [("foreign", 3), ("foreign", 60), ("tampered", 80), ("tampered", 150), ("tampered", 2 * MIB)]:
                proxy.set(Faults(direction="to_client", corrupt_byte=byte))
                with raises(PeerError, reason):
                    inside(pair[1], lambda: exchange(proxy))
            there.delivered.clear()
            proxy.set(Faults())
            inside(pair[1], lambda: exchange(proxy))
            assert there.delivered == [({"n": 1}, data)]
    finally:
        there.server.close()
