"""The ladder: memory, then disk, newest step first; a damaged copy costs that copy, and all of a step damaged cost the step."""

import time

import pytest
import torch

from lightning_plugins.engines.resilience import disk_folder, recovery
from lightning_plugins.engines.resilience.disk import write_step
from lightning_plugins.engines.resilience.disk_steps import step_folder, steps
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.shards import split
from lightning_plugins.engines.resilience.state_tree import pack

META = {"world_size": 1, "module": "m"}


def shards(step, source):
    """Return a state that says where it came from."""
    weights = {"state_dict": {"w": torch.full((2000,), float(step))}, "optimizer_states": [], "from": source}
    shared, own = split(weights, {"w"})
    return {"shared": shared, "rank0": own}


@pytest.fixture
def places(tmp_path):
    """Memory with steps 6 and 8, disk with 4, 6 and 8."""
    folder = tmp_path / "keeper"
    folder.mkdir(mode=0o700)
    disk_dir = tmp_path / "steps"
    disk_folder.claim(disk_dir, "job")
    for step in (4, 6, 8):
        write_step(disk_dir, step, shards(step, "disk"), META, keep=3)
    with KeeperClient("job", folder=folder) as client:
        for step in (6, 8):
            for shard, state in shards(step, "memory").items():
                client.capture(shard, pack(state), step, META)
                client.wait_sealed(shard, step, 10)
            client.commit("shared", step)
        yield client, disk_dir
        client.end()


def found(client, disk_dir, fits=lambda meta: meta == META):
    return recovery.find([recovery.Memory(client, 0), recovery.Disk(disk_dir, "job", 0)], fits)


def damage(disk_dir, step):
    """Flip a bit in the middle of the largest file of a step."""
    path = max(step_folder(disk_dir, step).iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def outcome(result):
    assert torch.equal(result.state["state_dict"]["w"], torch.full((2000,), float(result.step)))
    return result.step, result.state["from"]


def test_memory_is_first(places):
    assert outcome(found(*places)) == (8, "memory")


def test_disk_serves_what_memory_has_lost(places):
    client, disk_dir = places
    client.discard("rank0", 8)
    assert outcome(found(client, disk_dir)) == (8, "disk")


def test_a_damaged_copy_costs_a_copy_and_all_damaged_cost_a_step(places, monkeypatch, caplog):
    client, disk_dir = places
    load = client.load

    def damaged(shard, step):
        state, meta = load(shard, step)
        if step == 8:
            raise recovery.DamagedError("rank0", 8, 0, "a checksum differs")
        return state, meta

    monkeypatch.setattr(client, "load", damaged)
    assert outcome(found(client, disk_dir)) == (8, "disk")
    damage(disk_dir, 8)
    assert outcome(found(client, disk_dir)) == (6, "memory")
    assert caplog.text.count("step 8 from") == 3


def test_an_older_step_where_all_newer_ones_are_gone(places):
    client, disk_dir = places
    for step in (6, 8):
        client.discard("rank0", step)
        damage(disk_dir, step)
    assert outcome(found(client, disk_dir)) == (4, "disk")


def test_clocks_that_differ_decide_nothing(places, monkeypatch):
    """Steps have numbers: one that was written by a host whose clock is a year behind is the newest all the same."""
    client, disk_dir = places
    now_s = time.time()
    for step, year in ((10, 1), (12, -1)):
        monkeypatch.setattr(time, "time", lambda year=year: now_s + year * 365 * 86400)
        write_step(disk_dir, step, shards(step, "disk"), META, keep=2)
    monkeypatch.undo()
    assert [one.written_at > now_s for one in steps(disk_dir)] == [False, True]
    assert [one.step for one in steps(disk_dir)] == [12, 10]
    assert outcome(found(client, disk_dir)) == (12, "disk")


def test_nothing_where_nothing_fits_or_the_run_has_ended(places):
    client, disk_dir = places
    assert found(client, disk_dir, lambda meta: False) is None
    for step in (6, 8):
        client.discard("shared", step)
    disk_folder.mark_ended(disk_dir)
    assert found(client, disk_dir) is None
