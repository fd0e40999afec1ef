"""Fixtures and skip reasons of the whole suite, and the check that it leaves no process and no network namespace behind."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ranks import hosts as network
from tests.ranks import linux
from tests.ranks.client import Ranks
from tests.ranks.hosts import Hosts
from tests.ranks.launch import rank_server

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine or this call cannot run, and say why."""
    reasons = {"gpu": _why_no_gpu, "netns": network.why_not, "slow": lambda: _why_not_slow(config)}
    for marker, why_not in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch finds no GPU on this machine"


def _why_not_slow(config: pytest.Config) -> str:
    return "" if "slow" in config.option.markexpr else "slow: run by make test-slow, or with -m slow"


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session if a process or a namespace of the rank server or of `Hosts` outlives it."""
    yield
    deadline = time.monotonic() + 3.0  # a killed process takes a moment to vanish
    while (processes := linux.owned_by(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    namespaces = network.remaining(os.getpid())
    if processes or namespaces:
        pytest.fail(f"left behind by these tests: processes {processes}, network namespaces {namespaces}", pytrace=False)


@pytest.fixture(scope="session")
def ranks(nothing_left_behind: None) -> Iterator[Ranks]:
    """Several processes: ``ranks.run(function, world_size)`` and ``ranks.start(...)``, see ``tests/ranks/client.py``."""
    with rank_server(ROOT) as client:
        yield client


@pytest.fixture
def hosts() -> Iterator[Callable[..., Hosts]]:
    """Make hosts that vanish after the test: ``hosts(2, bandwidth_bytes_per_s=1.25e6)``; mark the test ``netns``."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Hosts(*args, **kwargs))
