"""Writers of steps that are killed at every fail-point and at moments drawn from the clock: what is shown is whole."""

import os
import random
import signal

import pytest

from lightning_plugins._support.failpoints import armed
from lightning_plugins.engines.resilience.disk import read_step, steps, write_step
from tests.engines.resilience.keeper_parts import assert_is_state_of, state_of
from tests.ranks.rank import progress

NUMBERS = 450_000  # two chunks of 4 MiB

# Fail-point -> hits of one write of one shard, with three steps on disk before the first of which is removed; by hand:
# files are shared.distcp, .metadata and manifest.json; folders synced are the step's and the one around it.
HITS = {
    "write": 3,
    "file_sync": 3,
    "file_synced": 3,
    "folder_sync": 2,
    "folder_synced": 2,
    "rename": 1,
    "renamed": 1,
    "verified": 1,
    "remove": 1,
    "removed": 1,
}
IN_PLACE = {("folder_sync", 2), ("folder_synced", 2), ("renamed", 1), ("verified", 1), ("remove", 1), ("removed", 1)}


def write(rank, world_size, folder, numbers, failpoints, first=3, last=100_000):
    """Write steps until killed, and say so."""
    with armed(failpoints):
        for step in range(first, last):
            progress(("begins", step))
            write_one(folder, step, numbers)
            progress(("written", step))


def write_one(folder, step, numbers=1000):
    write_step(folder, step, {"shared": state_of(step, numbers)}, {"step": step})


def check(folder, numbers):
    """Check that only whole steps are shown and that each is what it says; return their numbers."""
    found = steps(folder)
    for one in found:
        assert one.damage == ""
        assert one.meta == {"step": one.step}
        assert_is_state_of(read_step(one.path, "shared"), one.step, numbers)
    return [one.step for one in found]


@pytest.mark.parametrize(("name", "hit"), [(name, hit) for name, hits in HITS.items() for hit in range(1, hits + 1)])
def test_killed_at_a_failpoint(ranks, tmp_path, name, hit):
    for step in (1, 2):
        write_one(tmp_path, step)
    with ranks.start(write, 1, tmp_path, 1000, f"resilience/disk/{name}=kill:{hit}", init=False) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
        assert [step for _, (kind, step), _ in handle.messages if kind == "written"] == []
    expected = [3, 2, 1] if (name, hit) in IN_PLACE else [2, 1]
    assert check(tmp_path, 1000) == ([3, 2] if name == "removed" else expected)
    write_one(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:09d}" for step in ([3, 4] if (name, hit) in IN_PLACE else [2, 4])]


@pytest.mark.parametrize(("name", "hit"), [("moved_aside", 1), ("rename", 1), ("renamed", 1), ("folder_sync", 2)])
def test_killed_while_a_step_is_replaced(ranks, tmp_path, name, hit):
    """A run that went back writes a number once more: one of both is there once the next writer has come, and never a mixture."""
    for step in (2, 3):
        write_one(tmp_path, step)
    with ranks.start(write, 1, tmp_path, 1000, f"resilience/disk/{name}=kill:{hit}", init=False) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
    assert 2 in check(tmp_path, 1000)
    write_one(tmp_path, 4)
    assert check(tmp_path, 1000) == [4, 3]
    assert sorted(os.listdir(tmp_path)) == ["step-000000003", "step-000000004"]


@pytest.mark.parametrize("trials", [12, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_any_moment(ranks, tmp_path, trials):
    draws = random.Random(11)
    newest, torn = 0, 0
    for _ in range(trials):
        with ranks.start(write, 1, tmp_path, NUMBERS, "", newest + 1, init=False) as handle:
            handle.wait_for(("begins", newest + 1))
            handle.kill_at(0, seconds=draws.uniform(0, 0.3))
            assert handle.join(30) == [-signal.SIGKILL]
            written = [step for _, (kind, step), _ in handle.messages if kind == "written"]
        found = check(tmp_path, NUMBERS)
        torn += any(name.startswith(".") for name in os.listdir(tmp_path))
        assert max(found, default=0) in (max(written, default=newest), max(written, default=newest) + 1)
        assert len(found) >= min(2, max(found, default=0))
        newest = max(found, default=0)
    assert torn, "no kill came while a step was being written"
    write_one(tmp_path, newest + 1, NUMBERS)
    assert len(os.listdir(tmp_path)) == 2
