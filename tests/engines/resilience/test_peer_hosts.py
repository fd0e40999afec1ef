"""Copies between hosts that can be lost: network namespaces, each with a keeper of its own, links that are cut and that heal."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_plugins.engines.resilience.keeper_client import NoCopyError
from lightning_plugins.engines.resilience.keeper_folder import KeeperLostError
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import alive, assert_is_state_of, eventually, state_of
from tests.engines.resilience.peer_parts import NUMBERS, inside, node, secret

__all__ = ["node", "secret"]
pytestmark = pytest.mark.netns


def nodes_on(made, node):
    return [node(f"host{number}", host) for number, host in enumerate(made.hosts)]


def pair_up(one, other):
    one.client.partner(*other.listen())
    other.client.partner(*one.listen())


def test_a_host_lost_with_its_memory_comes_back_from_its_partner(hosts, node):
    made = hosts(3)
    lost, partner, spare = nodes_on(made, node)
    pair_up(lost, partner)
    for step in (10, 20):
        lost.keep(step, "rank0")
        partner.keep(step, "rank1")
    assert lost.safe_at_partner(20)
    assert partner.safe_at_partner(20)
    keeper = lost.client.keeper_pid
    made.lose(0)
    assert not alive(keeper)
    with pytest.raises(KeeperLostError):
        lost.client.generations()
    held = {(one.shard, one.step) for one in spare.client.peer_generations(*partner.address) if one.state == "committed"}
    assert {("rank0", 10), ("rank0", 20), ("rank1", 10), ("rank1", 20)} == held
    before = made.bytes_received(2)
    taken = spare.client.fetch("rank0", 20, *partner.address)
    assert 0 <= made.bytes_received(2) - before - taken < 0.05 * taken  # all of it came over the wire: there is no storage
    state, meta = spare.client.load("rank0", 20)
    assert_is_state_of(state, 20, NUMBERS)
    assert meta == {"of": 20}
    spare.keep(30, "rank0")
    spare.client.partner(*partner.address)
    assert spare.safe_at_partner(30)


def test_when_both_of_a_pair_are_lost_it_is_said_and_others_are_not_touched(hosts, node):
    made = hosts(4)
    one, other, third, fourth = nodes_on(made, node)
    pair_up(one, other)
    pair_up(third, fourth)
    for number, each in enumerate((one, other, third, fourth)):
        each.keep(5, f"rank{number}", 1000)
    assert all(each.safe_at_partner(5) for each in (one, other, third, fourth))
    made.lose(0)
    made.lose(1)
    for address in (third.address, fourth.address):
        held = {listed.shard for listed in third.client.peer_generations(*address)}
        assert held == {"rank2", "rank3"}
        with pytest.raises(NoCopyError, match=r"shard 'rank0' holds no whole step 5; it holds no step at all"):
            third.client.fetch("rank0", 5, *address)
    start_s = time.monotonic()
    with pytest.raises(NoCopyError, match=r"the peer at 10\.231\.0\.2:\d+ cannot be reached: .*; is its keeper running\?"):
        third.client.fetch("rank0", 5, *other.address)
    assert time.monotonic() - start_s < 15
    for number, each in ((2, fourth), (3, third)):
        assert_is_state_of(each.client.load(f"rank{number}", 5)[0], 5, 1000)


def longest_of(one, steps):
    """Return the longest capture and the longest commit, in seconds."""
    captures, commits = [], []
    for step in steps:
        packed = pack(state_of(step, NUMBERS))
        captures.append(one.client.capture("rank0", packed, step, {}).seconds)
        one.client.wait_sealed("rank0", step, 10)
        start_s = time.perf_counter()
        one.client.commit("rank0", step)
        commits.append(time.perf_counter() - start_s)
    return sorted(captures)[-2], sorted(commits)[-2]


def test_a_partner_that_is_cut_off_blocks_nobody_is_counted_and_is_served_again(hosts, node):
    made = hosts(2)
    one, other = nodes_on(made, node)
    one.keep(1)
    one.keep(2)
    alone = longest_of(one, range(3, 23))
    one.client.partner(*other.listen())
    assert one.safe_at_partner(22)
    made.cut(1)
    cut = longest_of(one, range(23, 43))
    status = one.client.peer_status()
    assert cut[0] < 2 * alone[0] + 0.02, (cut, alone)
    assert cut[1] < 2 * alone[1] + 0.02, (cut, alone)
    assert status["safe_step"] == 22
    assert status["waiting"] == 1
    assert status["overtaken"] == 19
    assert status["pushed"] == 1
    assert eventually(lambda: one.client.peer_status()["failures"].get("lost", 0) >= 1, 15)
    captured_at = {held.step: held.written_at for held in other.client.generations()}
    assert one.client.peer_status()["age_s"] == pytest.approx(time.time() - captured_at[22], abs=0.5)
    made.heal(1)
    assert one.safe_at_partner(42, 20)
    captured_at = {held.step: held.written_at for held in one.client.generations()}
    assert one.client.peer_status()["age_s"] == pytest.approx(time.time() - captured_at[42], abs=0.5)
    assert one.client.peer_status()["overtaken"] == 19
    assert_is_state_of(other.client.load("rank0", 42)[0], 42, NUMBERS)


def test_a_wire_slower_than_the_captures_still_brings_whole_steps(hosts, node):
    made = hosts(2, bandwidth_bytes_per_s=8e6)  # 1.5 s for a state
    one, other = nodes_on(made, node)
    one.client.partner(*other.listen())
    deadline = time.monotonic() + 8
    step = 0
    while time.monotonic() < deadline:
        step += 1
        one.keep(step)
        time.sleep(0.2)
        safe = one.client.peer_status()["safe_step"]
        if safe > 0:
            break
    assert 0 < safe < step
    assert one.client.peer_status()["overtaken"] > 0
    assert one.client.peer_status()["failures"] == {}
    assert_is_state_of(other.client.load("rank0", safe)[0], safe, NUMBERS)
    assert one.safe_at_partner(step, 10)


def test_what_is_overwritten_while_it_is_fetched_is_not_given_out(hosts, node):
    made = hosts(2, bandwidth_bytes_per_s=8e6)
    one, other = nodes_on(made, node)
    other.listen()
    other.keep(1)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(one.client.fetch, "rank0", 1, *other.address)
        time.sleep(0.5)
        other.keep(2)
        other.keep(3)
        with pytest.raises(NoCopyError, match=r"overwritten|holds no whole step 1|written anew"):
            fetched.result()
    assert all(state == "writing" for _, _, state, _ in one.held())


def test_keepers_listen_on_their_interface_alone(hosts, node):
    made = hosts(1)
    (one,) = nodes_on(made, node)
    one.listen()
    listening = inside(made.hosts[0], lambda: Path("/proc/thread-self/net/tcp").read_text())
    found = [line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"]
    assert found == [f"0100E70A:{one.address[1]:04X}"]
