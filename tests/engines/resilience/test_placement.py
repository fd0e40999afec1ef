"""Placement of copies: the probabilities by enumeration of all losses, and what every placement has to keep."""

from itertools import combinations, product

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.placement import place_copies


def names(count):
    return [f"host{number}" for number in range(count)]


def survived(partner, lost):
    """Say whether each shard is on a host that is left: its own, or the one with the copy."""
    return all(host not in lost or partner[host] not in lost for host in partner)


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_loss_of_two_hosts_by_enumeration_of_all_pairs(count):
    partner, ring = place_copies(names(count)), {host: (host + 1) % count for host in range(count)}
    losses = list(combinations(range(count), 2))
    share = sum(survived(partner, lost) for lost in losses) / len(losses)
    ring_share = sum(survived(ring, lost) for lost in losses) / len(losses)
    assert share == pytest.approx(1 - 1 / (count - 1))
    assert ring_share == pytest.approx(1 - 2 / (count - 1))
    if count == 16:
        assert round(100 * share, 1) == 93.3


def test_an_odd_host_costs_no_more_than_a_triple():
    partner = place_copies(names(5))
    bad = [lost for lost in combinations(range(5), 2) if not survived(partner, lost)]
    assert len(bad) == 1 + 3  # a pair, and the three pairs within the triple


@pytest.mark.parametrize("count", range(2, 34))
def test_every_host_has_one_partner_and_keeps_one_copy(count):
    partner = place_copies(names(count))
    assert sorted(partner) == sorted(partner.values()) == list(range(count))
    assert all(one != other for one, other in partner.items())
    mutual = [host for host in partner if partner[partner[host]] == host]
    triple = set(range(count)) - set(mutual)
    assert len(triple) == 3 * (count % 2)
    assert all(partner[partner[partner[host]]] == host for host in triple)


@pytest.mark.parametrize("count", range(2, 9))
def test_copies_are_in_another_rack_wherever_that_is_possible(count):
    for labels in product("abcd", repeat=count):
        if labels[0] != "a":
            continue  # other names, the same racks
        hosts = names(count)
        partner = place_copies(hosts, dict(zip(hosts, labels, strict=True)))
        assert sorted(partner) == sorted(partner.values()) == list(range(count))
        within = sum(labels[one] == labels[other] for one, other in partner.items())
        assert within == fewest_within(labels), (labels, partner)


def fewest_within(labels, cache={}):  # noqa: B006
    """Return the fewest copies within a rack, by trying all pairings and all triples."""
    key = tuple(sorted(labels))
    if key not in cache:
        cache[key] = min(costs(key), default=0)
    return cache[key]


def costs(labels):
    first, rest = labels[0] if labels else None, labels[1:]
    if not labels:
        return
    if len(labels) == 3:
        yield sum(one == other for one, other in zip(labels, labels[1:] + labels[:1], strict=True))
        return
    if len(labels) % 2:
        for one, other in combinations(range(len(rest)), 2):
            triple = (first, rest[one], rest[other])
            left = tuple(label for number, label in enumerate(rest) if number not in (one, other))
            yield sum(a == b for a, b in zip(triple, triple[1:] + triple[:1], strict=True)) + fewest_within(left)
    for number, other in enumerate(rest):
        yield 2 * (first == other) + fewest_within(rest[:number] + rest[number + 1 :])


def test_all_hosts_say_the_same():
    hosts = names(7)
    racks = dict(zip(hosts, "aabbbcc", strict=True))
    assert place_copies(hosts, racks) == place_copies(list(hosts), dict(reversed(racks.items())))


def test_a_single_host_has_no_partner():
    assert place_copies(["alone"]) == place_copies([]) == {}
    assert place_copies(["alone"], {"alone": "a"}) == {}


@pytest.mark.parametrize(
    ("hosts", "racks", "words"),
    [(["a", "b", "a"], None, "got a again"), (["a", "b"], {"a": "x"}, "none for b")],
)
def test_what_makes_no_sense_is_refused(hosts, racks, words):
    with pytest.raises(InputError, match=words):
        place_copies(hosts, racks)
