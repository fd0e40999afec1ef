"""Copies between keepers, as real processes on the loopback: push and fetch."""

import time

import pytest
import torch

from lightning_plugins.engines.resilience.keeper_client import KeeperClient, NoCopyError
from lightning_plugins.engines.resilience.keeper_records import COPIER, Records
from lightning_plugins.engines.resilience.keeper_slots import RefusedError
from lightning_plugins.engines.resilience.peer_wire import PeerConnection, PeerError
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, new_secret_file
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import assert_same, eventually, state_of, wide_state
from tests.engines.resilience.peer_parts import assert_holds, derived, node, pair_of, secret

__all__ = ["node", "secret"]


def test_a_commit_is_pushed_and_fetched_by_a_third_host_right_to_the_bit(node):
    one, other = pair_of(node)
    third = node("third")
    state = wide_state()
    one.client.capture("rank0", pack(state), 7, {"epoch": 1})
    one.client.wait_sealed("rank0", 7, 10)
    one.client.commit("rank0", 7)
    assert one.safe_at_partner(7)
    assert other.held() == [("rank0", 7, "committed", True)]
    third.client.fetch("rank0", 7, *other.address)
    assert third.held() == [("rank0", 7, "committed", False)]
    for client in (one.client, other.client, third.client):
        found, meta = client.load("rank0", 7)
        assert_same(found, state)
        assert meta == {"epoch": 1}
    (listed,) = third.client.peer_generations(*other.address)
    (own,) = one.client.generations()
    assert (listed.shard, listed.step, listed.state, listed.is_copy) == ("rank0", 7, "committed", True)
    assert (listed.bytes, listed.meta, listed.digest) == (own.bytes, own.meta, own.digest)
    assert listed.written_at == own.written_at


def test_digests_tell_one_bit_of_difference(node):
    one = node("one")
    digests = []
    for value in (1.0, 1.0, 1.0000001):
        one.client.capture("rank0", pack({"weights": torch.tensor([value])}), 3, {})
        one.client.wait_sealed("rank0", 3, 10)
        digests.append(max(one.client.generations(), key=lambda held: held.written_at).digest)
        one.client.discard("rank0", 3)
    assert digests[0] == digests[1] != digests[2]


def test_the_newest_two_copies_are_kept_and_memory_is_reused(node):
    one, other = pair_of(node)
    sizes = []
    for step in range(1, 7):
        one.keep(step)
        assert one.safe_at_partner(step)
        sizes.append(other.client.status()["jobs"]["job"])
    assert other.held() == [("rank0", 5, "committed", True), ("rank0", 6, "committed", True)]
    assert_holds(other.client, 5)
    assert_holds(other.client, 6)
    assert sizes[1] == sizes[-1]
    status = one.client.peer_status()
    assert (status["pushed"], status["overtaken"], status["waiting"], status["failures"]) == (6, 0, 0, {})
    assert status["bytes"] == sum(held.bytes for held in one.client.generations()) * 3
    assert 0 <= status["age_s"] < 10


def test_a_partner_that_takes_its_time_is_not_lost(node, monkeypatch):
    one = node("one")
    monkeypatch.setenv("LIGHTNING_PLUGINS_FAILPOINTS", "resilience/peers/work=sleep:3:2")
    other = node("other")
    one.client.partner(*other.listen())
    start_s = time.monotonic()
    one.keep(1)
    assert one.safe_at_partner(1)
    assert time.monotonic() - start_s > 3
    assert one.client.peer_status()["failures"] == {}


def test_what_is_sealed_and_not_committed_is_not_pushed(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    one.client.capture("rank0", pack(state_of(2, 1000)), 2, {})
    one.client.wait_sealed("rank0", 2, 10)
    time.sleep(0.2)
    assert other.held() == [("rank0", 1, "committed", True)]
    assert one.client.peer_status()["safe"] == {"rank0": 1}


def test_both_push_to_each_other_and_what_both_capture_is_not_copied(node):
    one, other = pair_of(node)
    other.client.partner(*one.listen())
    for step in (1, 2):
        for each, shards in ((one, ("rank0", "shared")), (other, ("rank1", "shared"))):
            for shard in shards:
                each.client.capture(shard, pack(state_of(step, 1000)), step, {})
                each.client.wait_sealed(shard, step, 10)
        one.client.commit("rank0", step)
        other.client.commit("rank1", step)
        assert one.safe_at_partner(step)
        assert other.safe_at_partner(step)
    assert sorted({(shard, copy) for shard, _, _, copy in one.held()}) == [("rank0", False), ("rank1", True), ("shared", False)]
    assert one.client.peer_status()["failures"] == {}


def test_replicas_that_differ_are_told(node):
    one, other = pair_of(node)
    for each, value in ((other, 1.0), (one, 2.0)):
        each.client.capture("shared", pack({"weights": torch.tensor([value])}), 1, {})
        each.client.wait_sealed("shared", 1, 10)
        each.client.commit("shared", 1)
    assert eventually(lambda: one.client.peer_status()["failures"] == {"refused": 1})
    assert one.client.peer_status()["safe_step"] == -1
    assert "with other values" in (one.folder / "keeper.log").read_text()


def test_copies_of_a_past_that_was_given_up_go_with_the_next_push(node):
    one, other = pair_of(node)
    for step in (10, 20):
        one.keep(step)
        assert one.safe_at_partner(step)
    one.keep(11)
    assert one.safe_at_partner(11)
    assert other.held() == [("rank0", 11, "committed", True)]


def test_a_shard_that_moves_to_the_host_with_its_copy_goes_on_there(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    assert_holds(other.client, 1)
    other.keep(2)
    one.keep(3)
    assert eventually(lambda: one.client.peer_status()["waiting"] == 0)
    assert other.held() == [("rank0", 1, "committed", True), ("rank0", 2, "committed", False)]
    assert one.client.peer_status()["safe"] == {"rank0": 1}
    assert one.client.peer_status()["failures"] == {}


def test_a_copy_never_takes_the_place_of_what_a_living_client_writes():
    records = Records(available=lambda: 1 << 30)
    for client in (1, 2):
        records.join(client, "job", 0)
    _, generation, _ = records.begin(1, "job", "rank0", 1, 10_000)
    with pytest.raises(RefusedError, match="captured on this host"):
        records.begin(COPIER, "job", "rank0", 1, 10_000, copy=True)
    assert [(held["generation"], held["is_copy"]) for held in records.generations("job", "rank0")] == [(generation, False)]
    records.leave(1)
    _, copied, _ = records.begin(COPIER, "job", "rank0", 1, 10_000, copy=True)
    records.write(("job", "rank0", copied), 4096, b"piece")
    records.begin(2, "job", "rank0", 2, 10_000)
    records.begin(2, "job", "rank0", 3, 10_000)
    with pytest.raises(RefusedError, match="being copied"):
        records.write(("job", "rank0", copied), 4096, b"late")


def test_a_partner_that_was_started_anew_gets_the_newest_step_again(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    other.client.end()
    assert other.held() == []
    other.listen()
    one.client.partner(*other.address)
    assert eventually(lambda: other.held() == [("rank0", 1, "committed", True)])


def test_a_partner_that_has_it_already_is_sent_nothing(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    one.client.partner(*other.address)
    assert one.safe_at_partner(1)
    status = one.client.peer_status()
    assert (status["bytes"], status["pushed"], status["overtaken"], status["failures"]) == (0, 1, 0, {})
    assert other.held() == [("rank0", 1, "committed", True)]


def test_a_job_that_has_ended_neither_serves_nor_takes_copies(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    other.client.end()
    assert other.client.peer_status() == {}
    one.keep(2)
    assert eventually(lambda: one.client.peer_status()["failures"].get("lost", 0) > 0)
    with pytest.raises(NoCopyError, match="cannot be reached"):
        one.client.peer_generations(*other.address)
    assert other.client.status()["jobs"] == {"job": 0}


def test_it_listens_once_and_again_where_that_is_wanted(node, secret):
    one = node("one")
    first = one.listen()
    assert one.listen() == first
    assert first[0] == "127.0.0.1"
    secret.unlink()
    new_secret_file(secret)
    assert one.listen() != first
    with pytest.raises(PeerError, match="cannot be reached"):
        PeerConnection.open(first, derived(), 5.0)


def test_a_secret_file_may_be_named_from_the_working_folder(node, secret, monkeypatch):
    monkeypatch.chdir(secret.parent)
    monkeypatch.setenv(FILE_VARIABLE, secret.name)
    assert node("one").listen()


def test_a_job_that_nobody_waits_for_any_more_is_served_no_longer(node, tmp_path):
    one = node("one")
    with KeeperClient("short", folder=one.folder, linger_s=0) as short:
        address = short.listen("127.0.0.1")
        PeerConnection.open(address, derived("short"), 5.0).close()
    assert eventually(lambda: "short" not in one.client.status()["peers"])
    with pytest.raises(PeerError, match="cannot be reached"):
        PeerConnection.open(address, derived("short"), 5.0)
