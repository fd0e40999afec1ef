"""Parts of the tests of copies between hosts: a host with a keeper of its own, on the loopback or in a network namespace."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.peer_wire import PeerConnection
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, VARIABLE, Secret, job_secret, new_secret_file
from lightning_plugins.engines.resilience.slots import HEADER_BYTES
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import alive, assert_is_state_of, eventually, keeper_of, state_of
from tests.ranks import linux
from tests.ranks.hosts import Host

NUMBERS = 1_000_000  # of a state: 12 MB, three chunks


class Node:
    """A host: a keeper with its folder, and a client.

    Args:
        folder: of the keeper.
        host: where the keeper stands; None is the loopback.
        job: name.
    """

    def __init__(self, folder: Path, host: Host | None = None, job: str = "job") -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self.folder = folder
        self.client: KeeperClient = inside(host, lambda: KeeperClient(job, folder=folder))
        self.interface = host.address if host else "127.0.0.1"

    def listen(self) -> tuple[str, int]:
        self.address = self.client.listen(self.interface)
        return self.address

    def keep(self, step: int, shard: str = "rank0", numbers: int = NUMBERS) -> None:
        """Capture a state that belongs to this step alone, and commit it."""
        self.client.capture(shard, pack(state_of(step, numbers)), step, {"of": step})
        self.client.wait_sealed(shard, step, 10)
        self.client.commit(shard, step)

    def held(self) -> list[tuple[str, int, str, bool]]:
        return sorted((one.shard, one.step, one.state, one.is_copy) for one in self.client.generations())

    def safe_at_partner(self, step: int, within_s: float = 10.0) -> bool:
        return eventually(lambda: self.client.peer_status().get("safe_step") == step, within_s)

    def close(self) -> None:
        self.client.close()
        pid = keeper_of(self.folder)
        if pid is not None:
            os.kill(pid, signal.SIGTERM)
            assert eventually(lambda: not alive(pid))


def inside(host: Host | None, function: Callable[[], Any]) -> Any:
    """Call it in a thread that stands in the host's network; what it starts stays there."""

    def run() -> Any:
        if host is not None:
            linux.enter_network_namespace(host.name)
        return function()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job's secret, in a file that the environment names."""
    path = tmp_path / "secret"
    new_secret_file(path)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    return path


@pytest.fixture
def node(tmp_path: Path, secret: Path) -> Iterator[Callable[..., Node]]:
    """Make hosts, ``node("a")`` or ``node("a", host, job="other")``, whose keepers end with the test."""
    with ExitStack() as stack:

        def make(name: str, host: Host | None = None, **options: Any) -> Node:
            made = Node(tmp_path / name, host, **options)
            stack.callback(made.close)
            return made

        yield make


def pair_of(node: Callable[..., Node]) -> tuple[Node, Node]:
    """Return two hosts, of which the first pushes to the second."""
    one, other = node("one"), node("other")
    one.client.partner(*other.listen())
    return one, other


def derived(job: str = "job") -> Secret:
    """Return the secret by which keepers of a job know each other."""
    return Secret(job_secret().key(b"job", job.encode()))


def assert_holds(client: KeeperClient, step: int, shard: str = "rank0") -> None:
    state, meta = client.load(shard, step)
    assert_is_state_of(state, step, NUMBERS)
    assert meta == {"of": step}


def connection_to(node: Node) -> PeerConnection:
    return PeerConnection.open(node.address, derived(), 5.0)


def damage(node: Node, offset: int = HEADER_BYTES + 5_000_000) -> None:
    """Flip a bit in each block of memory that the node's keeper holds."""
    folder = Path(f"/proc/{node.client.keeper_pid}/fd")
    paths = [path for path in folder.iterdir() if "lightning-plugins-slot" in os.readlink(path)]
    for path in {path.stat().st_ino: path for path in paths}.values():  # a mapping has a descriptor of its own
        with path.open("r+b") as block:
            block.seek(offset)
            byte = block.read(1)[0]
            block.seek(offset)
            block.write(bytes([byte ^ 1]))
