"""Hosts that are lost with their memory, network namespaces with a keeper each: the run goes on from the copy on the other."""

import os
import signal

import pytest

from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, new_secret_file
from tests.callbacks.memory_checkpoint.killed import run_on_hosts
from tests.callbacks.memory_checkpoint.runs import same
from tests.engines.resilience.keeper_parts import alive, eventually
from tests.engines.resilience.peer_parts import inside

pytestmark = [pytest.mark.adapter, pytest.mark.netns]


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


def start(ranks, made, tmp_path, folders, env, job):
    arguments = (str(tmp_path / "phase"), [str(folder) for folder in folders], job)
    return ranks.start(run_on_hosts, 2, *arguments, init=False, env=env, hosts=made.place(0, 1), timeout_s=120)


def test_a_host_lost_with_its_memory(ranks, two_hosts, tmp_path, monkeypatch):
    made, keepers, folders, env = two_hosts
    with start(ranks, made, tmp_path, folders, env, "whole") as handle:
        handle.join(120, until_failure=True)
        whole = handle.results()
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
