"""The keepers of a job's other hosts: each listens, all learn of each other through the store, pairs keep each other's copies.

A keeper that is replaced listens elsewhere: its host meets the others anew, and the host that pushes to it looks at each capture.
"""

import json
import logging
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import Store

from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.placement import place_copies

MEET_S = 60.0

log = logging.getLogger(__name__)

Address = tuple[str, int]


class Partner(NamedTuple):
    """The host that keeps copies of this host's captures: its number, and where its keeper listens."""

    node: int
    address: Address


class Met(NamedTuple):
    """What is known of the other hosts: where their keepers listen, and to which of them this rank has its keeper push."""

    others: list[Address]
    partner: Partner | None = None


def interface_address(toward: str) -> str:
    """Return this host's own address on the network that leads to another."""
    family, kind, protocol, _, target = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # nothing is sent
        probe.connect(target)
        return str(probe.getsockname()[0])


def meet(client: KeeperClient, store: Store, node: int, nodes: int, is_first_of_node: bool, toward: str) -> Met:
    """Have the keepers of all hosts know of each other, and return what is known; to be called on every rank.

    Without a secret no keeper listens, which is logged, and there are no copies.

    Args:
        client: of this rank.
        store: reached by all ranks.
        node: number of this host.
        nodes: their number.
        is_first_of_node: whether this is the one rank of its host that has the keeper listen.
        toward: address of a host on the process group's network.
    """
    if is_first_of_node:
        store.set(f"keeper/{node}", json.dumps(_listen(client, toward)))
    store.set_timeout(timedelta(seconds=MEET_S))
    addresses = [_address(store, number) for number in range(nodes)]
    known = [address for address in addresses if address is not None]
    if len(known) < nodes:
        return Met([])
    partner = None
    if is_first_of_node:
        number = place_copies([f"{host}:{port}" for host, port in known]).get(node)
        if number is not None:
            partner = Partner(number, known[number])
            client.partner(*partner.address)
    return Met([address for number, address in enumerate(known) if number != node], partner)


def follow(client: KeeperClient, store: Store, partner: Partner) -> Partner:
    """Have the keeper push to wherever the partner's keeper listens by now, and return that.

    Raises:
        KeeperError: see ``KeeperClient.partner``.
    """
    address = _address(store, partner.node)
    if address is None or address == partner.address:
        return partner
    client.partner(*address)
    return partner._replace(address=address)


def _address(store: Store, node: int) -> Address | None:
    told = json.loads(bytes(store.get(f"keeper/{node}")))
    return (str(told[0]), int(told[1])) if told else None


def _listen(client: KeeperClient, toward: str) -> Sequence[str | int]:
    try:
        return client.listen(interface_address(toward))
    except (KeeperError, OSError) as error:
        log.warning("there are no copies of this run on other hosts: %s", error)
        return []
