"""A TCP proxy with faults, in a process of its own: what a test puts between two peers that speak TCP.

    with Proxy((address, port), corrupt_byte=1000) as proxy:
        connect_to(proxy.address, proxy.port)

Each new connection gets the faults as they are set at that moment, on its way from the client to the target, from the target
to the client, or both. Between hosts the proxy stands on the switch, which all of them reach.

Cost: two copies through one Python thread, a few hundred MB/s; the delay shifts data in time and does not throttle it.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.ranks import linux
from tests.ranks.hosts import Host

_CHUNK_BYTES = 64 * 1024
_WAITING_CHUNKS = 1024  # what a delayed connection may hold: 64 MiB each way
_DIRECTIONS = ("to_target", "to_client", "both")


@dataclass(frozen=True)
class Faults:
    """What happens to a connection.

    Attributes:
        delay_s: every byte arrives this much later.
        corrupt_byte: the lowest bit of this byte, counted from 0, is flipped.
        truncate_after_bytes: after so many bytes both sides see an orderly end of the stream.
        drop_after_bytes: after at most so many bytes both sides see a reset, at the latest with the next byte sent.
        direction: which bytes are counted and treated: ``to_target``, ``to_client`` or ``both``.

    Raises:
        ValueError: for a negative number or an unknown direction.
    """

    delay_s: float = 0.0
    corrupt_byte: int | None = None
    truncate_after_bytes: int | None = None
    drop_after_bytes: int | None = None
    direction: str = "both"

    def __post_init__(self) -> None:
        if self.direction not in _DIRECTIONS:
            raise ValueError(f"direction must be {', '.join(_DIRECTIONS[:-1])} or {_DIRECTIONS[-1]}, got {self.direction!r}")
        for name, value in asdict(self).items():
            if name != "direction" and value is not None and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")


class Proxy:
    """A proxy to ``target``, for the length of a ``with`` block.

    Args:
        target: IPv4 address and port.
        faults: what happens to connections, until ``set`` says otherwise.
        host: one of the test's hosts; the proxy then stands on its switch. None: on this machine's loopback.

    Attributes:
        address: where clients connect to.
        port: likewise; chosen by the kernel.
    """

    def __init__(self, target: tuple[str, int], faults: Faults | None = None, host: Host | None = None) -> None:
        self.address = host.switch_address if host else "127.0.0.1"
        settings = {"target": list(target), "address": self.address, "namespace": host.switch if host else None}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.proxy", json.dumps(settings)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, linux.OWNER_VARIABLE: str(os.getpid())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.set(faults or Faults())
        self.port = int(self._answer())

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def set(self, faults: Faults) -> None:
        """Change the faults of the connections that are made from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(faults)) + "\n")
        self._process.stdin.flush()
        if hasattr(self, "port"):
            self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with exit code {self._process.wait()}; its error stands above")
        return line


async def _serve(settings: dict[str, Any]) -> None:
    if settings["namespace"]:
        linux.enter_network_namespace(settings["namespace"])
    loop = asyncio.get_running_loop()
    current = Faults(**json.loads(sys.stdin.readline()))
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)  # the event loop itself holds only weak references
        task.add_done_callback(connections.discard)
        await _connect(reader, writer, tuple(settings["target"]), current)

    server = await asyncio.start_server(accept, settings["address"], 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):  # its end is the test's end
        current = Faults(**json.loads(line))
        print("set", flush=True)


async def _connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int], faults: Faults) -> None:
    ends = [(reader, writer)]
    try:
        ends.append(await asyncio.open_connection(*target))
        pumps = [
            asyncio.create_task(_pump(ends[0][0], ends[1][1], faults if faults.direction != "to_client" else Faults())),
            asyncio.create_task(_pump(ends[1][0], ends[0][1], faults if faults.direction != "to_target" else Faults())),
        ]
        done, pending = await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        for pump in pending:
            pump.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for pump in done:
            pump.result()
    except _Truncated:
        # Closing a socket with unread bytes sends a reset: so say that nothing more comes, and read until the peers end.
        for _, each in ends:
            each.write_eof()
        await asyncio.gather(*(_discard(each) for each, _ in ends), return_exceptions=True)
    except (_Dropped, OSError):  # a peer's own reset, and a target that refuses, are handed on as a reset too
        for _, each in ends:
            each.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for _, each in ends:
        each.close()
        with contextlib.suppress(OSError):
            await each.wait_closed()


class _Truncated(Exception):
    """The number of bytes to truncate after has passed."""


class _Dropped(Exception):
    """The number of bytes to drop the connection after has passed."""


async def _discard(reader: asyncio.StreamReader) -> None:
    while await reader.read(_CHUNK_BYTES):
        pass


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults) -> None:
    loop = asyncio.get_running_loop()
    waiting: asyncio.Queue[tuple[float, bytes | OSError]] = asyncio.Queue(_WAITING_CHUNKS)

    async def read() -> None:
        data: bytes | OSError = b"not yet at the end"
        while data and not isinstance(data, OSError):
            try:
                data = await reader.read(_CHUNK_BYTES)
            except OSError as error:
                data = error
            await waiting.put((loop.time() + faults.delay_s, data))

    reading = asyncio.create_task(read())
    limits = [(faults.truncate_after_bytes, _Truncated), (faults.drop_after_bytes, _Dropped)]
    passed_bytes = 0
    try:
        while True:
            due, data = await waiting.get()
            await asyncio.sleep(due - loop.time())
            if isinstance(data, OSError):
                raise data
            if not data:
                writer.write_eof()
                return
            for limit, exception in limits:
                if limit is not None and passed_bytes + len(data) >= limit:
                    writer.write(_corrupted(data[: limit - passed_bytes], passed_bytes, faults.corrupt_byte))
                    await writer.drain()
                    raise exception
            writer.write(_corrupted(data, passed_bytes, faults.corrupt_byte))
            passed_bytes += len(data)
            await writer.drain()
    finally:
        reading.cancel()


def _corrupted(data: bytes, first: int, corrupt_byte: int | None) -> bytes:
    if corrupt_byte is None or not first <= corrupt_byte < first + len(data):
        return data
    changed = bytearray(data)
    changed[corrupt_byte - first] ^= 1
    return bytes(changed)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
