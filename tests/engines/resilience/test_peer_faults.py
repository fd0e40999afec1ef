"""Pushes and fetches through a wire with faults: nothing wrong is ever accepted, all is counted, the older copy stays."""

import pytest

from lightning_plugins.engines.resilience.keeper_client import NoCopyError
from tests.engines.resilience.keeper_parts import assert_is_state_of, eventually
from tests.engines.resilience.peer_parts import NUMBERS, node, secret
from tests.ranks.proxy import Faults, Proxy

__all__ = ["node", "secret"]
MIB = 1 << 20
FAULTS = [
    ("tampered", {"corrupt_byte": 6 * MIB}),
    ("tampered", {"corrupt_byte": 11 * MIB}),
    ("tampered", {"corrupt_byte": 260}),
    ("foreign", {"corrupt_byte": 30}),
    ("malformed", {"truncate_after_bytes": 5 * MIB + 77}),
    ("malformed", {"drop_after_bytes": 9 * MIB}),
]


@pytest.fixture
def pair(node):
    one, other = node("one"), node("other")
    other.listen()
    with Proxy(other.address) as proxy:
        yield one, other, proxy


@pytest.mark.parametrize(("reason", "fault"), FAULTS)
def test_a_fault_during_a_push(pair, reason, fault):
    one, other, proxy = pair
    one.client.partner(proxy.address, proxy.port)
    one.keep(1)
    assert one.safe_at_partner(1)
    proxy.set(Faults(direction="to_target", **fault))
    one.client.partner(proxy.address, proxy.port)  # a new connection, with the fault
    one.keep(2)
    assert eventually(lambda: other.client.peer_status()["refused"][reason] >= 1), other.client.peer_status()
    assert eventually(lambda: sum(one.client.peer_status()["failures"].values()) >= 1)
    assert ("rank0", 1, "committed", True) in other.held()
    assert not any(step == 2 and state in ("sealed", "committed") for _, step, state, _ in other.held())
    assert_is_state_of(other.client.load("rank0", 1)[0], 1, NUMBERS)
    proxy.set(Faults())
    assert one.safe_at_partner(2, 15)
    assert_is_state_of(other.client.load("rank0", 2)[0], 2, NUMBERS)


@pytest.mark.parametrize(("reason", "fault"), FAULTS)
def test_a_fault_during_a_fetch(pair, reason, fault):
    one, other, proxy = pair
    other.keep(2)
    one.keep(1)
    proxy.set(Faults(direction="to_client", **fault))
    with pytest.raises(NoCopyError):
        one.client.fetch("rank0", 2, proxy.address, proxy.port)
    assert [(step, state) for _, step, state, _ in one.held() if state != "writing"] == [(1, "committed")]
    proxy.set(Faults())
    one.client.fetch("rank0", 2, proxy.address, proxy.port)
    assert_is_state_of(one.client.load("rank0", 2)[0], 2, NUMBERS)
    assert_is_state_of(one.client.load("rank0", 1)[0], 1, NUMBERS)


def test_a_partner_that_has_lost_the_copy_is_no_longer_counted_on(pair):
    one, other, proxy = pair
    proxy.set(Faults(direction="to_target", drop_after_bytes=14 * MIB))
    one.client.partner(proxy.address, proxy.port)
    one.keep(1)
    assert one.safe_at_partner(1)
    other.client.discard("rank0", 1)
    proxy.set(Faults(direction="to_target", drop_after_bytes=MIB))  # enough to ask what is held, not to push
    one.keep(2)
    assert eventually(lambda: one.client.peer_status()["safe"] == {})
    assert one.client.peer_status()["safe_step"] == -1
    assert one.client.peer_status()["age_s"] is None
    proxy.set(Faults())
    assert one.safe_at_partner(2, 15)
