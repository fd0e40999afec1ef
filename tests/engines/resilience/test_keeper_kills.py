"""Writers that are killed at every fail-point and at moments drawn from the clock: what is committed stays whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_plugins._support.failpoints import armed
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import alive, assert_is_state_of, client, eventually, folder, state_of
from tests.ranks.rank import progress

__all__ = ["client", "folder"]
FAILPOINTS = ("copy", "tensor", "seal", "commit", "committed")
NUMBERS = 1_000_000
ROOT = Path(__file__).parents[3]


def write(rank, world_size, folder, first_step, failpoints=""):
    """Capture and commit one step after the other until killed, and say which are committed."""
    client = KeeperClient("job", folder=folder)
    with armed(failpoints):
        for step in range(first_step, first_step + 100_000):
            packed = pack(state_of(step, NUMBERS))
            progress(("begins", step))
            client.capture("rank0", packed, step, {"step": step})
            progress(("captured", step))
            client.wait_sealed("rank0", step, 20)
            progress(("sealed", step))
            client.commit("rank0", step)
            progress(("committed", step))


def check_after_kill(client, messages):
    """Check all that is held against what the writer has said before it died; return the last committed step."""
    said = {kind: max((step for _, (other, step), _ in messages if other == kind), default=0) for kind in ("sealed", "committed")}
    assert eventually(lambda: not [kept for kept in client.generations() if kept.state == "writing"], 10)
    assert alive(client.keeper_pid)
    kept = {one.step: one for one in client.generations("rank0")}
    committed = [step for step, one in kept.items() if one.state == "committed"]
    assert max(committed, default=0) in (said["committed"], said["sealed"])
    if said["committed"]:
        assert max(committed) >= said["committed"]
    for step, one in kept.items():
        state, meta = client.load("rank0", step)
        assert_is_state_of(state, step, NUMBERS)
        assert one.meta == meta == {"step": step}
    return max(committed, default=0)


@pytest.mark.parametrize("failpoint", FAILPOINTS)
@pytest.mark.parametrize("hit", [1, 6])
def test_killed_at_a_failpoint(folder, client, ranks, failpoint, hit):
    specification = f"resilience/capture/{failpoint}=kill:{hit}"
    with ranks.start(write, 1, str(folder), 1, specification, init=False) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
        last = check_after_kill(client, handle.messages)
    # By hand: `tensor` is passed four times a step, everything else once.
    killed_in = (hit - 1) // 4 + 1 if failpoint == "tensor" else hit
    assert last == (killed_in if failpoint == "committed" else killed_in - 1)
    held = sorted(kept.step for kept in client.generations())
    if failpoint == "commit":
        assert killed_in in held  # sealed, and so not lost
    with ranks.start(write, 1, str(folder), 100, "resilience/capture/committed=kill:3", init=False) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
        assert check_after_kill(client, handle.messages) == 102


def test_killed_at_moments_drawn_from_the_clock(folder, client, ranks):
    draws = random.Random(7)
    first, phases = 1, []
    # Twelve, and more if chance has hit the same phase each time.
    while len(phases) < 12 or (len(set(phases)) < 2 and len(phases) < 40):
        with ranks.start(write, 1, str(folder), first, init=False) as handle:
            handle.wait_for(("committed", first))
            handle.kill_at(0, draws.uniform(0, 0.08))
            assert handle.join(30) == [-signal.SIGKILL]
            last = check_after_kill(client, handle.messages)
            phases.append(handle.messages[-1][1][0])
        assert last >= first
        first = last + 1
    assert len(set(phases)) >= 2, phases  # in the copy, and while checksums were computed


def test_a_loaders_worker_does_not_keep_its_dead_trainer_connected(folder, client):
    """A forked child that outlives the trainer has inherited its connection, and must have closed it."""
    program = """
import os, sys, time
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.state_tree import pack
client = KeeperClient("job", folder=sys.argv[1])
writing = client.begin("rank0", pack({"a": 1}), 1, {})
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(folder)]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    try:
        assert [kept.state for kept in client.generations()] == ["writing"]
        trainer.kill()
        trainer.wait()
        assert eventually(lambda: client.generations() == [] and client.status()["clients"] == 1)
        assert alive(worker)
    finally:
        os.kill(worker, signal.SIGKILL)
        trainer.stdout.close()


def test_the_keeper_survives_the_group_and_the_session_of_who_started_it(folder):
    program = """
import sys, time
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import state_of
client = KeeperClient("job", folder=sys.argv[1])
client.capture("rank0", pack(state_of(3, 1000)), 3, {})
client.wait_sealed("rank0", 3, 10)
client.commit("rank0", 3)
print(client.keeper_pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(folder)]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    keeper = int(trainer.stdout.readline())
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    time.sleep(0.2)
    with KeeperClient("job", folder=folder) as client:
        assert client.keeper_pid == keeper
        assert_is_state_of(client.load("rank0", 3)[0], 3, 1000)
        client.end()
