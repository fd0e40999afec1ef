"""Parts of the keeper's tests: states to keep, a comparison bit by bit, and a folder whose keeper ends with the test."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import connect
from lightning_plugins.engines.resilience.messages import receive, send
from tests.ranks import linux


def wide_state() -> dict[str, Any]:
    """One of everything that a state may hold."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    payload_nan = torch.tensor([0x7FC00001, 0x7F800123, -0x80000000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    return {
        "model": module.state_dict(),
        "floats": {name: torch.randn(5).to(getattr(torch, name)) for name in ("float16", "bfloat16", "float64", "complex64")},
        "float8": [torch.randn(7).to(torch.float8_e4m3fn), torch.randn(3).to(torch.float8_e5m2)],
        "integers": tuple(torch.arange(-3, 4).to(dtype) for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64)),
        "special": payload_nan,
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "plain": [
            1,
            -(2**70),
            2.5,
            float("inf"),
            "text",
            None,
            True,
            b"\x00\xff",
            (),
            ("tensor", 0, False, False),
            {"tuple": [()]},
        ],
        7: {(1, 2): torch.ones(1)},
    }


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's values as bytes, in row-major order."""
    return bytes(tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(found: Any, expected: Any, path: str = "state") -> None:
    """Compare types, structure, values and every bit of every tensor."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, bits(found)) == (expected.dtype, expected.shape, bits(expected)), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    else:
        assert found == expected, path


@cache
def _places(numbers: int) -> list[torch.Tensor]:
    return [torch.arange(numbers, dtype=torch.int32) * factor for factor in (31, 37, 41)]


def state_of(step: int, numbers: int = 300_000) -> dict[str, Any]:
    """Return a state that belongs to one step alone, of 12 bytes a number."""
    return {
        "step": step,
        "weights": [places + step * 7919 for places in _places(numbers)],
        "mark": torch.full((17,), float(step)),
    }


def assert_is_state_of(state: dict[str, Any], step: int, numbers: int = 300_000) -> None:
    """Check that nothing of another step is in a state."""
    expected = state_of(step, numbers)
    assert state["step"] == step
    assert torch.equal(state["mark"], expected["mark"])
    assert all(torch.equal(one, other) for one, other in zip(state["weights"], expected["weights"], strict=True))


def alive(pid: int) -> bool:
    """Say whether a process runs; one that nobody has reaped does not."""
    return linux.state(pid) not in ("", "Z")


def eventually(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Wait until a condition holds, and say whether it came to that; a busy machine has its time."""
    deadline = time.monotonic() + within_s
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return held


def keeper_of(folder: Path) -> int | None:
    """Return the process of the keeper that serves a folder, if there is one."""
    connection = connect(folder)
    if connection is None:
        return None
    with connection, suppress(ConnectionError):  # it may be just ending
        send(connection, {"do": "status"})
        if (received := receive(connection, 5.0)) is not None:
            return int(received[0]["pid"])
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A private folder; its keeper is ended with the test."""
    path = tmp_path / "keeper"
    path.mkdir(mode=0o700)
    yield path
    pid = keeper_of(path)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        assert eventually(lambda: not alive(pid))
    assert eventually(lambda: list(path.iterdir()) == [])


@pytest.fixture
def client(folder: Path) -> Iterator[KeeperClient]:
    """A client of the job ``job``."""
    with KeeperClient("job", folder=folder) as made:
        yield made
