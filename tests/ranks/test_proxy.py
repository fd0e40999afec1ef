"""The proxy: each fault against a server that echoes, and what an untouched byte stream looks like behind it."""

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from tests.ranks import hosts as network
from tests.ranks.proxy import Faults, Proxy

DATA = bytes(range(256)) * 2000


@contextmanager
def echo_server():
    """Echo every connection until its end, and count what arrived."""
    listener = socket.create_server(("127.0.0.1", 0))
    received = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection):
        arrived = bytearray()
        received.append(arrived)
        with connection:
            try:
                while data := connection.recv(65536):
                    arrived += data
                    connection.sendall(data)
            except OSError:
                arrived += b"reset"

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname(), received
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def exchange(proxy, data=DATA):
    """Send all, end the sending side; return what came back, and whether sending or receiving ended in an error."""
    back = bytearray()
    errors = []

    def send():
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        except OSError as error:
            errors.append(error)

    with socket.create_connection((proxy.address, proxy.port), timeout=10) as client:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            while chunk := client.recv(65536):
                back += chunk
        except ConnectionResetError as error:
            errors.append(error)
        sender.join()
    return bytes(back), bool(errors)


def test_without_faults_every_byte_passes():
    with echo_server() as (target, received), Proxy(target) as proxy:
        assert exchange(proxy) == (DATA, False)
        assert received == [DATA]


@pytest.mark.parametrize("position", [0, 70_000, len(DATA) - 1])
def test_one_bit_is_flipped_where_it_was_asked_for(position):
    with echo_server() as (target, received), Proxy(target, Faults(corrupt_byte=position, direction="to_target")) as proxy:
        back, _ = exchange(proxy)
    expected = bytearray(DATA)
    expected[position] ^= 1
    assert back == received[0] == expected


@pytest.mark.parametrize("after", [0, 1, 65_536, 100_000])
def test_truncation_is_an_orderly_end(after):
    with echo_server() as (target, received), Proxy(target, Faults(truncate_after_bytes=after, direction="to_target")) as proxy:
        _, reset = exchange(proxy)
        assert not reset
        _until(lambda: received == [DATA[:after]])


def test_a_truncated_client_can_go_on_sending_without_a_reset():
    with echo_server() as (target, received), Proxy(target, Faults(truncate_after_bytes=10, direction="to_target")) as proxy:
        with socket.create_connection((proxy.address, proxy.port), timeout=10) as client:
            client.sendall(DATA[:100])
            assert client.recv(1) == b""
            for _ in range(3):  # a reset comes back after the first and shows at the second
                time.sleep(0.05)
                client.sendall(DATA[:100])
        _until(lambda: received == [DATA[:10]])


def test_truncation_on_the_way_back():
    with echo_server() as (target, _), Proxy(target, Faults(truncate_after_bytes=100_000, direction="to_client")) as proxy:
        assert exchange(proxy) == (DATA[:100_000], False)


def test_a_drop_is_a_reset_for_both():
    with echo_server() as (target, received), Proxy(target, Faults(drop_after_bytes=100_000, direction="to_target")) as proxy:
        back, reset = exchange(proxy)
        assert reset
        assert len(back) <= 100_000
        _until(lambda: received and received[0].endswith(b"reset"))
        assert len(received[0]) <= 100_000 + len(b"reset")


def test_a_delay_shifts_and_does_not_throttle():
    """Many chunks, each delayed: together they are late once on each way, not once a chunk."""
    with echo_server() as (target, _), Proxy(target, Faults(delay_s=0.2)) as proxy:
        started = time.monotonic()
        assert exchange(proxy) == (DATA, False)
        assert 0.4 <= time.monotonic() - started < 1.6  # 3 s and more if each chunk waited for the one before


def test_faults_change_for_new_connections_only():
    with echo_server() as (target, _), Proxy(target) as proxy:
        with socket.create_connection((proxy.address, proxy.port), timeout=10) as old:
            old.sendall(b"a")
            assert old.recv(1) == b"a"
            proxy.set(Faults(corrupt_byte=1))
            old.sendall(b"b")
            assert old.recv(1) == b"b"
        assert exchange(proxy, b"ab") == (b"ab", False)  # flipped twice, once on each way
        proxy.set(Faults(corrupt_byte=1, direction="to_client"))
        assert exchange(proxy, b"ab") == (b"ac", False)


def test_a_refusing_target_is_a_reset():
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = free.getsockname()
    with Proxy(target) as proxy:
        assert exchange(proxy, b"")[1]


@pytest.mark.netns
def test_it_stands_between_hosts(hosts):
    """A client on host 0, a server on host 1, the proxy on the switch that joins them."""
    pair = hosts(2)
    server = (
        "import socket\nlistener = socket.create_server(('0.0.0.0', 4000)); print('listening', flush=True)\n"
        "connection, _ = listener.accept(); print(connection.recv(100, socket.MSG_WAITALL).decode(), flush=True)"
    )
    client = "import socket, sys\nsocket.create_connection((sys.argv[1], int(sys.argv[2]))).sendall(b'abc')"
    inside = [["ip", "netns", "exec", host.name, sys.executable, "-c"] for host in pair.hosts]
    with subprocess.Popen([*inside[1], server], stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout.readline() == "listening\n"
        with Proxy((pair.hosts[1].address, 4000), Faults(corrupt_byte=1), host=pair.hosts[0]) as proxy:
            subprocess.run([*inside[0], client, proxy.address, str(proxy.port)], check=True, timeout=10)
            assert serving.stdout.readline() == "acc\n"
    assert proxy.address == network.SWITCH_ADDRESS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay_s": -1}, "delay_s must be 0 or more, got -1"),
        ({"corrupt_byte": -5}, "corrupt_byte must be 0 or more, got -5"),
        ({"direction": "up"}, "must be to_target, to_client or both, got 'up'"),
    ],
)
def test_bad_faults_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Faults(**arguments)


def _until(condition, timeout_s=5):
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
