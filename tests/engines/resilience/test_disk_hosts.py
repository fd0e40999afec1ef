"""Steps of several hosts in one folder: two keepers, two writers, and a step that is whole or not there."""

import logging
import os
import shutil
import signal
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import VARIABLE, armed
from lightning_plugins.engines.resilience import disk, disk_folder, disk_pieces, disk_start
from lightning_plugins.engines.resilience.commit import make_store
from lightning_plugins.engines.resilience.disk import DamagedFileError, read_step, steps, write_step
from lightning_plugins.engines.resilience.disk_client import DiskWriter
from lightning_plugins.engines.resilience.disk_pieces import IncompleteError, Share, complete, make_start, write_piece
from lightning_plugins.engines.resilience.disk_tier import DiskTier
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.place import Place
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import alive, assert_is_state_of, assert_same, eventually, keeper_of, state_of

NUMBERS = 5_000
SHARDS = [["shared", "rank0"], ["rank1"]]  # that each host brings to disk
CAPTURED = [["shared", "rank0"], ["shared", "rank1"]]


def patient(_):
    """Give no step up."""
    return ""


def check(disk_dir):
    """Check every step that is shown, and return their numbers."""
    found = steps(disk_dir)
    for one in found:
        assert (one.damage, one.meta["step"]) == ("", one.step)
        for shard in ("shared", "rank0", "rank1"):
            assert_is_state_of(read_step(one.path, shard), one.step, NUMBERS)
    return [one.step for one in found]


def left_over(disk_dir):
    """Return what stands in a folder beside its steps, starts opened."""
    paths = [
        path for path in disk_dir.rglob("*") if not any(part.startswith("step-") for part in path.relative_to(disk_dir).parts)
    ]
    return sorted(path.name for path in paths if path.name != "run.json" and not path.name.startswith((".start-", "node")))


class Node:
    """A host: its keeper, and its writer or its tier."""

    def __init__(self, folder, number):
        folder.mkdir(mode=0o700)
        self.folder, self.number = folder, number
        self.client = KeeperClient("job/0", folder=folder)
        self.writer = self.tier = None

    def capture(self, step, start, commit=True):
        if self.tier is not None:
            self.tier.capturing(step)
        for shard in CAPTURED[self.number]:
            self.client.capture(shard, pack(state_of(step, NUMBERS)), step, {"step": step, "start": start})
        for shard in CAPTURED[self.number]:
            self.client.wait_sealed(shard, step, 10)
        if commit:
            self.client.commit(CAPTURED[self.number][0], step)

    def start_writer(self, disk_dir, start, gather_s=60.0, **options):
        share = Share(str(start), self.number, 2, gather_s)
        self.writer = DiskWriter(disk_dir, self.client.folder, "job/0", SHARDS[self.number], share=share, **options)
        return self.writer

    def close(self):
        for writer in (self.writer, self.tier and self.tier._writer):
            if writer is not None:
                if alive(writer.pid):
                    os.kill(writer.pid, signal.SIGKILL)
                writer.close(clean=False)
        self.client.close()
        if (pid := keeper_of(self.folder)) is not None:
            os.kill(pid, signal.SIGTERM)
            assert eventually(lambda: not alive(pid))


@pytest.fixture
def nodes(tmp_path):
    with ExitStack() as stack:
        made = [Node(tmp_path / f"keeper{number}", number) for number in range(2)]
        for one in made:
            stack.callback(one.close)
        yield made


@pytest.fixture
def disk_dir(tmp_path):
    path = tmp_path / "disk"
    disk_folder.claim(path, "job/0")
    return path


@pytest.fixture
def start(disk_dir):
    return make_start(disk_dir)


def has_written(node, step):
    return eventually(lambda: node.writer.status().newest == step, 30)


def failure(writer, step):
    """Return the reason for which a step was not written."""
    assert eventually(lambda: step in dict(writer.status().failures), 30)
    return dict(writer.status().failures)[step]


# Writers


def test_pieces_of_two_hosts_become_the_step_that_one_host_would_have_written(nodes, disk_dir, start, tmp_path):
    for node in nodes:
        node.start_writer(disk_dir, start)
    for step in (10, 20, 30):
        for node in nodes:
            node.capture(step, start.name)
        for node in nodes:
            node.writer.persist(step)
        assert all(has_written(node, step) for node in nodes)
    assert check(disk_dir) == [30, 20]
    assert left_over(disk_dir) == []
    states = {shard: state_of(30, NUMBERS) for shard in ("shared", "rank0", "rank1")}
    alone = write_step(tmp_path, 30, states, {"step": 30, "start": start.name})
    together = disk_dir / "step-000000030"
    assert sorted(os.listdir(together)) == sorted(os.listdir(alone))
    one, other = (FileSystemReader(path).read_metadata() for path in (alone, together))
    assert (one.state_dict_metadata, one.planner_data) == (other.state_dict_metadata, other.planner_data)
    assert {key: vars(place) for key, place in one.storage_data.items()} == {
        key: vars(place) for key, place in other.storage_data.items()
    }
    wanted = {"mark": torch.zeros(17), "rank1": {"mark": torch.zeros(17)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, checkpoint_id=str(together))
    assert_same(wanted, {"mark": torch.full((17,), 30.0), "rank1": {"mark": torch.full((17,), 30.0)}})
    for node in reversed(nodes):
        node.writer.close(clean=True)
    assert disk_folder.read_run(disk_dir)["ended"] is True


def test_a_piece_that_never_comes_costs_its_step_only(nodes, disk_dir, start, monkeypatch):
    nodes[0].start_writer(disk_dir, start)
    monkeypatch.setenv(VARIABLE, "resilience/disk/write=kill")
    nodes[1].start_writer(disk_dir, start)
    monkeypatch.delenv(VARIABLE)
    for node in nodes:
        node.capture(10, start.name)
        node.writer.persist(10)
    assert eventually(lambda: not alive(nodes[1].writer.pid), 30)
    assert eventually(lambda: (start / "node0" / "step-000000010").exists())
    assert check(disk_dir) == []
    nodes[0].writer.give_up(10, "host 1 is\nfull")
    assert failure(nodes[0].writer, 10) == "host 1 is full"
    assert [name for name in left_over(disk_dir) if name.endswith(".part")]
    for node in nodes:
        node.capture(20, start.name)
        node.writer.persist(20)
    assert all(has_written(node, 20) for node in nodes)
    assert check(disk_dir) == [20]
    assert left_over(disk_dir) == []


def test_a_piece_is_not_waited_for_without_end(nodes, disk_dir, start):
    nodes[0].start_writer(disk_dir, start, gather_s=0.5)
    nodes[0].capture(10, start.name)
    nodes[0].writer.persist(10)
    assert failure(nodes[0].writer, 10) == "node 1 has not written its piece of step 10 within 0.5 s"
    nodes[1].start_writer(disk_dir, start)
    nodes[1].capture(30, start.name)
    nodes[1].writer.persist(30)
    assert has_written(nodes[1], 30)
    nodes[0].capture(20, start.name)
    nodes[0].writer.persist(20)
    assert failure(nodes[0].writer, 20) == "node 1 has left out step 20"
    assert check(disk_dir) == []


def test_the_last_step_of_dead_trainers_is_the_one_that_node_0_has(nodes, disk_dir, start):
    """Node 1 was killed between the job's decision and its own commit, and has captured one step more as well."""
    for node in nodes:
        node.start_writer(disk_dir, start)
    nodes[0].capture(10, start.name)
    nodes[1].capture(10, start.name, commit=False)
    nodes[1].capture(20, start.name, commit=False)
    for node in nodes:
        node.writer.close(clean=False)
    assert eventually(lambda: not any(alive(node.writer.pid) for node in nodes), 30)
    assert check(disk_dir) == [10]
    assert disk_folder.read_run(disk_dir)["ended"] is False


def test_what_an_earlier_start_has_captured_is_not_written(nodes, disk_dir, start):
    for node, name in zip(nodes, (start.name, ".start-of-another"), strict=True):
        node.start_writer(disk_dir, start, gather_s=1.0)
        node.capture(10, name)
        node.writer.persist(10)
    assert failure(nodes[1].writer, 10) == "step 10 was overwritten in memory before it could be read"
    assert failure(nodes[0].writer, 10)
    assert check(disk_dir) == []


# Pieces


def shares(start, gather_s=0.2):
    return [Share(str(start), node, 2, gather_s) for node in range(2)]


def write_pieces(start, step, nodes=(0, 1)):
    for node in nodes:
        states = {shard: state_of(step, NUMBERS) for shard in SHARDS[node]}
        write_piece(shares(start)[node], step, states, {"step": step, "start": start.name})


def test_a_piece_of_an_earlier_start_gets_into_no_step(disk_dir, start):
    write_pieces(start, 10)
    later = make_start(disk_dir)
    write_pieces(later, 10, nodes=(0,))
    with pytest.raises(IncompleteError, match="node 1 has not written its piece of step 10"):
        complete(disk_dir, shares(later)[0], 10, 2, -1, patient)
    (later / "node1").mkdir()
    shutil.copytree(start / "node1" / "step-000000010", later / "node1" / "step-000000010")
    with pytest.raises(DamagedFileError, match=f"is of {start.name}, node 1"):
        complete(disk_dir, shares(later)[0], 10, 2, -1, patient)
    assert check(disk_dir) == []


def test_pieces_of_different_captures_are_not_put_together(disk_dir, start):
    for node in range(2):
        states = {shard: state_of(10, NUMBERS) for shard in SHARDS[node]}
        write_piece(shares(start)[node], 10, states, {"step": 10, "start": str(node)})
    with pytest.raises(IncompleteError, match="the pieces of step 10 are of different captures"):
        complete(disk_dir, shares(start)[0], 10, 2, -1, patient)


def test_a_piece_that_names_files_elsewhere_is_refused(disk_dir, start, monkeypatch):
    write_pieces(start, 10)
    manifest = {"step": 10, "start": start.name, "node": 0, "meta": {}, "files": {"../../run.json": {}}}
    monkeypatch.setattr(disk_pieces, "check_sizes", lambda path: manifest)
    with pytest.raises(DamagedFileError, match=r"names files \['\.\./\.\./run\.json'\]"):
        complete(disk_dir, shares(start)[0], 10, 2, -1, patient)


def test_an_earlier_start_that_is_late_replaces_nothing(disk_dir, start):
    write_pieces(start, 10)
    later = make_start(disk_dir)
    assert later.name > start.name
    write_pieces(later, 20)
    complete(disk_dir, shares(later)[0], 20, 2, 5, patient)
    assert [name for name in os.listdir(disk_dir) if name.startswith(".start-")] == [later.name]
    with pytest.raises(InputError, match="a later start of the run writes here now"):
        write_pieces(start, 10)
    assert check(disk_dir) == [20]


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(disk_folder, "locked", lambda disk_dir: nullcontext(False))


@pytest.mark.parametrize(
    ("module", "name", "shown"), [(disk_folder, "sync_folder", [20]), (disk, "verify", [20, 10])], ids=["name", "removal"]
)
def test_a_later_start_writes_in_between(disk_dir, start, monkeypatch, no_locks, module, name, shown):
    """On a file system without locks, right before the earlier one gives its step a name, or right before it removes others."""
    write_pieces(start, 10)
    later = make_start(disk_dir)
    write_pieces(later, 20)
    real = getattr(module, name)

    def in_between(*arguments, **options):
        monkeypatch.setattr(module, name, real)
        done = real(*arguments, **options)
        complete(disk_dir, shares(later)[0], 20, 2, 10, patient)
        return done

    monkeypatch.setattr(module, name, in_between)
    if shown == [20]:
        with pytest.raises(InputError, match="a later start of the run writes here now"):
            complete(disk_dir, shares(start)[0], 10, 2, -1, patient)
    else:
        complete(disk_dir, shares(start)[0], 10, 2, -1, patient)
    assert check(disk_dir) == shown
    assert left_over(disk_dir) == []


def complete_and_die(rank, world_size, disk_dir, start, failpoints):
    disk_folder.locked = lambda disk_dir: nullcontext(False)
    with armed(failpoints):
        complete(Path(disk_dir), shares(start)[0], 20, 2, None, patient)


@pytest.mark.parametrize(
    ("place", "shown", "at_last"),
    [
        ("piece_moved=kill", [10], [30, 20]),  # the other piece is there still
        ("piece_moved=kill:2", [10], [30, 10]),
        ("write=kill", [10], [30, 10]),
        ("file_synced=kill:2", [10], [30, 10]),
        ("rename=kill", [10], [30, 10]),
        ("renamed=kill", [20, 10], [30, 20]),
    ],
)
def test_killed_while_a_step_is_put_together(ranks, no_locks, disk_dir, start, place, shown, at_last):
    for step in (10, 20):
        write_pieces(start, step)
        if step == 10:
            complete(disk_dir, shares(start)[0], step, 2, -1, patient)
    with ranks.start(complete_and_die, 1, str(disk_dir), str(start), f"resilience/disk/{place}", init=False) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
    assert check(disk_dir) == shown
    with suppress(IncompleteError):  # what the writer does that is started again
        write_pieces(start, 20, nodes=(0,))
        complete(disk_dir, shares(start)[0], 20, 2, None, patient)
    write_pieces(start, 30)
    complete(disk_dir, shares(start)[0], 30, 2, None, patient)
    assert check(disk_dir) == at_last
    assert left_over(disk_dir) == []


# Tiers


@pytest.fixture
def meet():
    """Make the tiers of two hosts, which meet in a store."""
    first = make_store(0, 2, "127.0.0.1")
    stores = [first, make_store(1, 2, "127.0.0.1", first.port)]

    def make(*folders, every=10):
        def one(node):
            return DiskTier(folders[node], "job/0", Place(node, 0, 2, node, 2), stores[node], every, 60.0)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    return make


def join(nodes, tiers):
    """Give each host its tier, and wait until all writers have started."""
    for node, tier in zip(nodes, tiers, strict=True):
        node.tier = tier
    assert all_ready(nodes)


def all_ready(nodes):
    return eventually(lambda: settled(nodes, 0) or all(node.tier._writer.is_ready for node in nodes), 30)


def join_with(nodes, tiers, monkeypatch, failpoints, number=1):
    """Do so with fail-points in the writer of one host."""
    monkeypatch.setenv(VARIABLE, failpoints)
    tiers[number].settled(0, nodes[number].client.folder)
    monkeypatch.delenv(VARIABLE)
    join(nodes, tiers)


def settled(nodes, step):
    for node in nodes:
        node.tier.settled(step, node.client.folder)


def run_to(nodes, *numbers):
    for step in numbers:
        for node in nodes:
            node.capture(step, node.tier.meta["start"])
        settled(nodes, step)


def test_a_folder_that_both_see(nodes, tmp_path, meet, caplog):
    disk_dir = tmp_path / "disk"
    join(nodes, meet(disk_dir, disk_dir))
    assert nodes[0].tier.meta == nodes[1].tier.meta
    run_to(nodes, 5, 10)
    assert eventually(lambda: check(disk_dir) == [10], 30)
    assert [sorted(node.tier.source().metas()) for node in nodes] == [[10], [10]]
    for node in reversed(nodes):
        node.tier.end()
    assert sorted(os.listdir(disk_dir)) == ["run.json", "step-000000010"]
    assert disk_folder.read_run(disk_dir)["ended"] is True
    assert caplog.text == ""


def test_a_folder_on_each_host(tmp_path, meet, monkeypatch, caplog):
    monkeypatch.setattr(disk_start, "SEE_S", 0.2)
    one, other = tmp_path / "one", tmp_path / "other"
    disk_folder.claim(other, "job/0")
    write_step(other, 10, {"shared": {}})
    tiers = meet(one, other)
    (warning,) = caplog.records
    assert warning.getMessage().startswith("no states go to disk in this run: host 1 (")
    assert f"does not see in {other} what host 0 has written there; give a disk_dir on storage" in warning.getMessage()
    assert [tier.source() for tier in tiers] == [None, None]
    assert [tier.meta for tier in tiers] == [{}, {}]
    assert os.listdir(one) == ["run.json"]


def test_another_jobs_folder_is_refused_on_all_hosts(tmp_path, meet):
    disk_folder.claim(tmp_path / "disk", "other")
    with pytest.raises(InputError, match="belongs to job 'other', not to job 'job/0'"):
        meet(tmp_path / "disk", tmp_path / "disk")


@pytest.mark.parametrize("node", [0, 1])
def test_a_host_that_may_not_write_is_named_and_all_may_read(tmp_path, meet, node, caplog):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a folder read-only")
    disk_dir, view = tmp_path / "disk", tmp_path / "view"
    disk_folder.claim(disk_dir, "job/0")
    write_step(disk_dir, 10, {"shared": {}}, {"world_size": 2})
    view.mkdir()
    if subprocess.run(["mount", "--bind", disk_dir, view], check=False).returncode:
        pytest.skip("nothing can be mounted")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", view], check=True)
        tiers = meet(*([view, disk_dir] if node == 0 else [disk_dir, view]))
    finally:
        subprocess.run(["umount", view], check=True)
    (warning,) = caplog.records
    named = "" if node == 0 else "host 1"
    assert warning.getMessage().startswith(f"no states go to disk in this run: {named}")
    assert f"nothing can be kept in {view}: Read-only file system" in warning.getMessage()
    assert sorted(os.listdir(disk_dir)) == ["run.json", "step-000000010"]
    assert list(tiers[1 - node].source().metas()) == [10]


def test_a_folder_that_is_none_costs_the_tier(tmp_path, meet, caplog):
    (tmp_path / "file").touch()
    tiers = meet(tmp_path / "file" / "disk", tmp_path / "file" / "disk")
    assert [tier.source().metas() for tier in tiers] == [{}, {}]
    assert "no states go to disk in this run: " in caplog.text
    assert "steps on disk cannot be looked for: " in caplog.text
    for tier in tiers:
        tier.end()


def test_a_folder_that_one_host_cannot_read_costs_the_tier(tmp_path, meet, monkeypatch, caplog):
    def listed(folder):
        if folder == tmp_path / "view":
            raise PermissionError(13, "Permission denied")
        return numbered(folder)

    numbered = disk_start.numbered
    monkeypatch.setattr(disk_start, "numbered", listed)
    (tmp_path / "disk").mkdir()
    (tmp_path / "view").symlink_to(tmp_path / "disk")
    assert [tier.source() for tier in meet(tmp_path / "disk", tmp_path / "view")] == [None, None]
    (warning,) = caplog.records
    assert warning.getMessage().startswith("no states go to disk in this run: host 1 (")
    assert "Permission denied" in warning.getMessage()


def test_a_run_ends_though_its_folder_has_gone(nodes, tmp_path, meet):
    disk_dir = tmp_path / "disk"
    join(nodes, meet(disk_dir, disk_dir))
    shutil.rmtree(disk_dir)
    for node in reversed(nodes):
        node.tier.end()


@pytest.mark.parametrize("what", ["full", "kill"])
def test_a_host_that_fails_costs_the_step_and_is_named(nodes, tmp_path, meet, monkeypatch, caplog, what):
    disk_dir = tmp_path / "disk"
    join_with(nodes, meet(disk_dir, disk_dir), monkeypatch, f"resilience/disk/piece={what}")
    run_to(nodes, 10)
    reason = "No space left on device" if what == "full" else "the process that writes has died"

    def is_named():
        settled(reversed(nodes), 10)
        said = [record.getMessage() for record in caplog.records]
        return any("could not write step 10: host 1 (" in one and reason in one for one in said)

    assert eventually(is_named, 30)
    assert len(caplog.records) == 2  # what host 1 says itself, and what host 0 says of it
    assert all_ready(nodes)
    run_to(nodes, 20)
    assert eventually(lambda: check(disk_dir) == [20], 30)


def test_the_writer_of_node_0_dies_and_goes_on(nodes, tmp_path, meet, monkeypatch, caplog):
    disk_dir = tmp_path / "disk"
    join_with(nodes, meet(disk_dir, disk_dir), monkeypatch, "resilience/disk/piece_moved=kill", number=0)
    run_to(nodes, 10)
    assert eventually(lambda: settled(nodes, 10) or caplog.records, 30)
    assert caplog.records[0].getMessage() == "the disk tier could not write step 10: the process that writes has died"
    assert all_ready(nodes)
    run_to(nodes, 20)
    assert eventually(lambda: check(disk_dir) == [20], 30)
    assert eventually(lambda: left_over(disk_dir) == [], 10)


def test_both_leave_out_the_same_steps_while_one_is_slow(nodes, tmp_path, meet, monkeypatch, caplog):
    disk_dir = tmp_path / "disk"
    slow = "resilience/disk/file_sync=sleep:2,resilience/disk/file_synced=sleep:1:3"
    join_with(nodes, meet(disk_dir, disk_dir, every=1), monkeypatch, slow)
    step = 0

    def third():
        nonlocal step
        step += 1
        run_to(nodes, step)
        return len(check(disk_dir)) == 2 and check(disk_dir)[0] > 20

    assert eventually(third, 30)
    assert caplog.text == ""
    assert all(node.tier._writer.status().failures == () for node in nodes)


def test_a_host_whose_writer_dies_again_and_again_ends_the_tier(nodes, tmp_path, meet, caplog):
    disk_dir = tmp_path / "disk"
    join(nodes, meet(disk_dir, disk_dir))
    caplog.set_level(logging.WARNING)
    for step in (10, 20, 30, 40, 50):
        run_to(nodes, step)
        if (writer := nodes[1].tier._writer) is not None and alive(writer.pid):
            os.kill(writer.pid, signal.SIGKILL)
            assert eventually(lambda pid=writer.pid: not alive(pid))
        eventually(lambda: settled(reversed(nodes), 0) or nodes[0].tier._writer.unfinished < 0, 30)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("no more states go to disk")]
    assert len(said) == 2
    assert "host 1" in said[1]
    assert all("has died 3 times" in one for one in said)
