"""Which host keeps a copy of which: disjoint pairs, not a ring.

If two of N hosts are lost at once, a ring of copies, each at the next host, loses a shard with probability 2/(N-1), disjoint
pairs with 1/(N-1): 93.3 % survive with 16 hosts, as in GEMINI (Wang et al., SOSP 2023). TRANSOM uses the ring. An odd host makes
one pair a triple, whose hosts copy to each other in a cycle.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from lightning_plugins._support.errors import InputError


def place_copies(hosts: Sequence[str], racks: Mapping[str, str] | None = None) -> dict[int, int]:
    """Say, for each rank of a list, which rank's host keeps the copy.

    Args:
        hosts: name of each node's host, in an order that all nodes share; one entry for each keeper.
        racks: label of the failure domain of each host, such as its rack or power supply. Pairs then stand in two racks as
            far as no rack holds more than half of the hosts; None: every host is a domain of its own.

    Returns:
        For each index into ``hosts`` the index of its partner; nothing for a single host, which has none.

    Raises:
        InputError: if a host is named twice, since a copy on the same host is none, or has no label.
    """
    twice = sorted({host for host in hosts if list(hosts).count(host) > 1})
    if twice:
        raise InputError(f"hosts must name each host once, got {', '.join(twice)} again; give one entry for each keeper")
    missing = sorted(set(hosts) - set(racks)) if racks is not None else []
    if missing:
        raise InputError(f"racks must have a label for each host, got none for {', '.join(missing)}; label all hosts or none")
    if len(hosts) < 2:
        return {}
    order = _by_rack([(racks or {}).get(host, host) for host in hosts])
    # Hosts of one rack stand together, so half of the list further on is another rack, unless a rack is larger than that half.
    half = len(order) // 2
    groups = [[order[number], order[number + half]] for number in range(half)]
    if len(order) % 2:
        groups[0].append(order[-1])  # the largest rack's first and the smallest one's last: the two that fit best
    return {one: group[(number + 1) % len(group)] for group in groups for number, one in enumerate(group)}


def _by_rack(labels: Sequence[str]) -> list[int]:
    """Return the indices with those of a rack together, the largest rack first, else as they were given."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    return [index for rack in sorted(members.values(), key=len, reverse=True) for index in rack]
