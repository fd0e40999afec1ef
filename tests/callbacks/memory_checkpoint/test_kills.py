"""SIGKILL of a rank at a moment that the test draws from the clock, against a run that was left alone: the same bits."""

import os
import time
from collections import Counter

import pytest
import torch

from lightning_plugins.engines.resilience.disk_steps import steps
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from tests.callbacks.memory_checkpoint.killed import PHASES, run, run_combined, run_sharded, run_wide
from tests.callbacks.memory_checkpoint.runs import same
from tests.engines.resilience.keeper_parts import eventually
from tests.ranks.client import kill_times

pytestmark = pytest.mark.adapter


@pytest.fixture
def keeper(tmp_path, monkeypatch):
    """A keeper that belongs to the test: ranks' processes all end with their job."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    with KeeperClient("held by the test") as client:
        descriptors = f"/proc/{client.keeper_pid}/fd"
        before = len(os.listdir(descriptors))
        yield {"XDG_RUNTIME_DIR": str(folder)}
        # Every job ended by itself in the end: neither its memory nor a connection is left.
        deadline = time.monotonic() + 20.0
        while (len(os.listdir(descriptors)), client.status()["clients"]) > (before, 1) and time.monotonic() < deadline:
            time.sleep(0.05)
        status = client.status()
        assert (len(os.listdir(descriptors)), status["clients"], list(status["jobs"])) == (before, 1, ["held by the test"])
        client.end()


def trials(ranks, env, folder, world_size, count, seed, lazy=False, disk=False):
    """Kill one rank of each of ``count`` runs, start again, and return what differed and the phases that were hit.

    With ``disk`` the runs are longer, the time counts from the first step on disk, and every third run has lost its memory as
    well when it is started again.
    """
    path = str(folder / "phase")

    def arguments(job):
        for rank in range(world_size):
            with open(f"{path}{rank}", "wb") as file:
                file.write(bytes(2))
        memory = {"disk_dir": str(folder / job), "disk_every_n_steps": 2} if disk else {}
        return run, world_size, path, job, {"lazy": lazy, **memory}, 24 if disk else 2

    def wait(handle, job):
        handle.wait_for("training")
        assert not disk or eventually(lambda: steps(folder / job / "fit-0", thorough=False), 60)

    with ranks.start(*arguments("whole"), init=False, env=env, timeout_s=120) as handle:
        wait(handle, "whole")
        start_s = time.monotonic()
        handle.join(120, until_failure=True)
        within_s = time.monotonic() - start_s
        whole = handle.results()
    differing, hit, resumed = [], Counter(), Counter()
    for number, (rank, seconds) in zip(range(count), kill_times(seed, world_size, within_s), strict=False):
        job = f"trial {number}"
        with ranks.start(*arguments(job), init=False, env=env, timeout_s=120) as handle:
            wait(handle, job)
            handle.kill_at(rank, seconds)
            codes = handle.join(120, until_failure=True)
        if codes[rank] == 0:  # it was faster
            continue
        with open(f"{path}{rank}", "rb") as file:
            phase, committing = file.read(2)
        hit[PHASES[phase]] += 1
        hit["commit"] += committing
        # All of a job's processes are killed right after its rank: the disk writer leaves what it was about to write.
        hit["disk"] += any((folder / job).glob("fit-0/.*.part"))
        if loses_memory := disk and number % 3 == 2:
            with KeeperClient(f"{job}/0") as client:
                client.end()
        found = ranks.run(*arguments(job), init=False, env=env, timeout_s=120)
        differing += [
            (number, PHASES[phase], of_rank, names)
            for of_rank in range(world_size)
            if (names := same(whole[of_rank], found[of_rank]))
        ]
        resumed["disk" if loses_memory else "memory"] += len(found[0]["seen"]) < len(whole[0]["seen"])
    return differing, hit, resumed


@pytest.mark.parametrize(("world_size", "lazy", "disk"), [(1, False, True), (2, False, False), (2, True, False)])
def test_killed_at_any_time(ranks, keeper, tmp_path, world_size, lazy, disk):
    differing, hit, resumed = trials(ranks, keeper, tmp_path, world_size, 4, seed=os.getpid(), lazy=lazy, disk=disk)
    print(f"phases hit: {dict(hit)}; runs went on from {dict(resumed)}")
    assert differing == []


OLD = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 wants a GPU: its streams record events")


@pytest.mark.parametrize(
    ("function", "world_size", "batch", "arguments"),
    [
        (run_wide, 3, 4, ()),
        (run_combined, 2, 8, ()),
        pytest.param(run_sharded, 2, 9, (), marks=OLD),
        pytest.param(run_sharded, 3, 5, (), marks=OLD),
        (run_sharded, 2, 9, (True,)),
    ],
    ids=["three of DDP", "all three", "two of FSDP2", "three of FSDP2", "tensor parallel"],
)
def test_killed_at_a_batch(ranks, keeper, tmp_path, function, world_size, batch, arguments):
    """Plain DDP of three ranks, which lays its buckets out anew after the first pass of every start, and adds three numbers in
    another order then; Preconditioner, OkTopkStrategy and MemoryCheckpoint in one Trainer; ranks with unequal parts of
    a model."""
    path = str(tmp_path / "phase")
    for rank in range(world_size):
        (tmp_path / f"phase{rank}").write_bytes(bytes(2))
    whole = ranks.run(function, world_size, path, "whole", *arguments, init=False, env=keeper, timeout_s=120)
    with ranks.start(function, world_size, path, "killed", *arguments, init=False, env=keeper, timeout_s=120) as handle:
        handle.wait_for(("batch", batch))
        handle.kill(1)
        handle.join(120, until_failure=True)
    found = ranks.run(function, world_size, path, "killed", *arguments, init=False, env=keeper, timeout_s=120)
    assert [same(*pair) for pair in zip(whole, found, strict=True)] == [[]] * world_size
    assert all(len(one["seen"]) < len(other["seen"]) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize(("world_size", "signalled"), [(1, [0]), (2, [1]), (2, [0, 1])])
def test_sigterm_stops_all_ranks_after_the_same_step(ranks, keeper, tmp_path, world_size, signalled):
    """Signalled at any point of a step; Lightning's own handler would have the ranks wait for each other inside of the signal."""
    path = str(tmp_path / "phase")
    for rank in range(world_size):
        (tmp_path / f"phase{rank}").write_bytes(bytes(2))
    whole = ranks.run(run, world_size, path, "whole", init=False, env=keeper, timeout_s=120)
    with ranks.start(run, world_size, path, "stopped", init=False, env=keeper, timeout_s=120) as handle:
        for number, rank in enumerate(signalled):
            handle.wait_for(("batch", 1 + number), ranks=[rank])
            handle.terminate(rank)
        assert handle.join(20) == [143] * world_size
        output = handle.output(0)
    assert "SIGTERM: stopped after step" in output
    stopped_at = int(output.split("SIGTERM: stopped after step ")[1].split(",")[0])
    found = ranks.run(run, world_size, path, "stopped", init=False, env=keeper, timeout_s=120)
    assert [same(*pair) for pair in zip(whole, found, strict=True)] == [[]] * world_size
    assert len(whole[0]["seen"]) - len(found[0]["seen"]) == stopped_at


@pytest.mark.slow
def test_killed_three_hundred_times(ranks, keeper, tmp_path):
    differing, hit, resumed = [], Counter(), Counter()
    for number, (world_size, lazy, disk, count) in enumerate(
        [(1, False, False, 90), (2, False, False, 90), (2, True, False, 60), (1, False, True, 60)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = trials(ranks, keeper, folder, world_size, count, seed=number, lazy=lazy, disk=disk)
        print(f"{count} runs of {world_size}, lazy={lazy}, disk={disk}: phases hit {dict(found[1])}, went on {dict(found[2])}")
        differing += found[0]
        hit, resumed = hit + found[1], resumed + found[2]
    print(f"phases hit: {dict(hit)}; runs went on from {dict(resumed)}")
    assert differing == []
    assert resumed["memory"] > 100
    assert resumed["disk"] >= 10
    assert min(hit[phase] for phase in (*PHASES[1:6], "commit", "disk")) >= 10
