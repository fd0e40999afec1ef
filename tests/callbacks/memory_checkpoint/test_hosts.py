"""Hosts that are lost with their memory, network namespaces with a keeper each: the run goes on from the copy on the other."""

import os
import signal

import pytest
import torch

from lightning_plugins.engines.resilience.disk_steps import steps
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, new_secret_file
from lightning_plugins.recipes.checkpoint_words import run_word
from tests.callbacks.memory_checkpoint.killed import run_on_hosts, run_on_hosts_apart, run_on_storage
from tests.callbacks.memory_checkpoint.runs import Regression, same
from tests.engines.resilience.keeper_parts import alive, eventually
from tests.engines.resilience.peer_parts import inside

pytestmark = [pytest.mark.adapter, pytest.mark.netns]
LONG = 40  # epochs of 3 batches, in which keepers and writers are started while the training runs


def keeper_on(host, folder, monkeypatch):
    """Start a host's keeper, which belongs to the test: ranks' processes all end with their job."""
    folder.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return inside(host, lambda: KeeperClient("held by the test"))


@pytest.fixture
def two_hosts(hosts, tmp_path, monkeypatch):
    """Two hosts with a keeper each, and the job's secret on both."""
    made = hosts(2)
    secret = tmp_path / "secret"
    new_secret_file(secret)
    monkeypatch.setenv(FILE_VARIABLE, str(secret))
    folders = [tmp_path / "host0", tmp_path / "host1"]
    keepers = [keeper_on(host, folder, monkeypatch) for host, folder in zip(made.hosts, folders, strict=True)]
    for rank in range(2):
        (tmp_path / f"phase{rank}").write_bytes(bytes(2))
    yield made, keepers, folders, {FILE_VARIABLE: str(secret)}
    for keeper in keepers:
        keeper.end()
        keeper.close()


def start(ranks, made, tmp_path, folders, env, job, *options, training=run_on_hosts):
    arguments = (str(tmp_path / "phase"), [str(folder) for folder in folders], job, *options)
    return ranks.start(training, 2, *arguments, init=False, env=env, hosts=made.place(0, 1), timeout_s=120)


def test_a_host_lost_with_its_memory(ranks, two_hosts, tmp_path, monkeypatch):
    made, keepers, folders, env = two_hosts
    with start(ranks, made, tmp_path, folders, env, "whole") as handle:
        handle.join(120, until_failure=True)
        whole = handle.results()
        assert all("memory_checkpoint/neighbour_age_s" in handle.output(rank) for rank in range(2))
    with start(ranks, made, tmp_path, folders, env, "lost") as handle:
        handle.wait_for(("batch", 9))
        handle.kill(1)
        handle.join(120, until_failure=True)
    lost = keepers[1].keeper_pid
    os.kill(lost, signal.SIGKILL)
    assert eventually(lambda: not alive(lost))
    keepers[1].close()
    keepers[1] = keeper_on(made.hosts[1], folders[1], monkeypatch)
    with start(ranks, made, tmp_path, folders, env, "lost") as handle:
        handle.join(120, until_failure=True)
        found = handle.results()
        outputs = [handle.output(rank) for rank in range(2)]
    assert [same(*pair) for pair in zip(whole, found, strict=True)] == [[], []]
    assert len(found[1]["seen"]) < len(whole[1]["seen"])
    assert "from the memory of this host" in outputs[0]
    assert "from the memory of another host" in outputs[1]


def test_a_keeper_that_was_replaced_gets_copies(ranks, two_hosts, tmp_path, monkeypatch):
    made, keepers, folders, env = two_hosts
    with start(ranks, made, tmp_path, folders, env, "replaced", False, LONG) as handle:
        handle.wait_for(("batch", 9))
        handle.stop(1)  # so that the new keeper is not started by the rank, with which it would end
        os.kill(keepers[1].keeper_pid, signal.SIGKILL)
        assert eventually(lambda: not alive(keepers[1].keeper_pid))
        keepers[1].close()
        keepers[1] = keeper_on(made.hosts[1], folders[1], monkeypatch)
        handle.cont(1)
        with KeeperClient("replaced/0", folder=keepers[1].folder) as client:
            assert eventually(lambda: any(one.is_copy and one.shard == "rank0" for one in client.generations()), 30)
        handle.join(120, until_failure=True)
        assert "goes on with a new one" in handle.output(1)
        handle.results()


def kill_both_with_their_memory(handle, made, keepers, folders, monkeypatch):
    for rank in range(2):
        handle.kill(rank)
    assert handle.join(30) == [-signal.SIGKILL] * 2
    for number, keeper in enumerate(keepers):
        os.kill(keeper.keeper_pid, signal.SIGKILL)
        assert eventually(lambda pid=keeper.keeper_pid: not alive(pid))
        keeper.close()
        keepers[number] = keeper_on(made.hosts[number], folders[number], monkeypatch)


def test_both_hosts_lost_with_their_memory(ranks, two_hosts, tmp_path, monkeypatch):
    made, keepers, folders, env = two_hosts
    disk_dir = tmp_path / "storage"
    options = (str(disk_dir), LONG)
    with start(ranks, made, tmp_path, folders, env, "whole", False, LONG) as handle:
        handle.join(120, until_failure=True)
        whole = handle.results()
    with start(ranks, made, tmp_path, folders, env, "lost", *options, training=run_on_storage) as handle:
        handle.wait_for("training")
        assert eventually(lambda: len(steps(disk_dir / "fit-0")) == 2, 60)
        kill_both_with_their_memory(handle, made, keepers, folders, monkeypatch)
    on_disk = steps(disk_dir / "fit-0")
    assert [one.damage for one in on_disk] == ["", ""]
    assert run_word(["export", str(disk_dir / "fit-0"), "--output", str(tmp_path / "one.ckpt")]) == 0
    exported = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert exported["global_step"] == on_disk[0].step
    Regression().load_state_dict(exported["state_dict"])
    with start(ranks, made, tmp_path, folders, env, "lost", *options, training=run_on_storage) as handle:
        handle.join(120, until_failure=True)
        found = handle.results()
        outputs = [handle.output(rank) for rank in range(2)]
    assert [same(*pair) for pair in zip(whole, found, strict=True)] == [[], []]
    assert all(0 < len(one["seen"]) < len(other["seen"]) for one, other in zip(found, whole, strict=True))
    assert f"going on from step {on_disk[0].step}, from disk, {disk_dir}" in outputs[0]
    assert f"from disk, {disk_dir}" in outputs[1]
    assert {one for one in os.listdir(disk_dir / "fit-0") if not one.startswith("step-")} <= {"run.json", "writer.log"}


@pytest.mark.parametrize("is_named", [True, False])
def test_hosts_with_a_disk_each_are_told_so_once(ranks, two_hosts, tmp_path, is_named):
    made, _, folders, env = two_hosts
    root = tmp_path / "root"
    root.mkdir()
    options = (str(root / "steps") if is_named else None, str(root))
    with start(ranks, made, tmp_path, folders, env, "apart", *options, training=run_on_hosts_apart) as handle:
        handle.join(120, until_failure=True)
        assert [len(one["seen"]) for one in handle.results()] == [18, 18]
        outputs = [handle.output(rank) for rank in range(2)]
    assert outputs[0].count("no states go to disk in this run: host 1 (") == 1
    assert "give a disk_dir on storage that all hosts share, or disk_dir=False" in outputs[0]
    assert "no states go to disk" not in outputs[1]
    assert list(root.rglob("step-*")) == list(root.rglob(".start-*")) == []


def test_without_a_secret_there_are_no_copies_and_it_is_said(ranks, hosts, tmp_path, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    made = hosts(2)
    folders = [tmp_path / "host0", tmp_path / "host1"]
    keepers = [keeper_on(host, folder, monkeypatch) for host, folder in zip(made.hosts, folders, strict=True)]
    for rank in range(2):
        (tmp_path / f"phase{rank}").write_bytes(bytes(2))
    with start(ranks, made, tmp_path, folders, {}, "bare") as handle:
        handle.join(120, until_failure=True)
        handle.results()
        assert "there are no copies of this run on other hosts" in handle.output(0)
    for keeper in keepers:
        keeper.end()
        keeper.close()
