"""The keepers of a job's other hosts: each listens, all learn of each other through the store, pairs keep each other's copies."""

import json
import logging
import socket
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store

from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.placement import place_copies

MEET_S = 60.0

log = logging.getLogger(__name__)

Address = tuple[str, int]


def interface_address(toward: str) -> str:
    """Return this host's own address on the network that leads to another."""
    family, kind, protocol, _, target = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # nothing is sent
        probe.connect(target)
        return str(probe.getsockname()[0])


def meet(client: KeeperClient, store: Store, node: int, nodes: int, is_first_of_node: bool, toward: str) -> list[Address]:
    """Have the keepers of all hosts know of each other, and return the others' addresses; to be called on every rank.

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
    addresses = [json.loads(bytes(store.get(f"keeper/{number}"))) for number in range(nodes)]
    if not all(addresses):
        return []
    if is_first_of_node:
        partner = place_copies([f"{host}:{port}" for host, port in addresses]).get(node)
        if partner is not None:
            client.partner(*addresses[partner])
    return [(str(host), int(port)) for number, (host, port) in enumerate(addresses) if number != node]


def _listen(client: KeeperClient, toward: str) -> Sequence[str | int]:
    try:
        return client.listen(interface_address(toward))
    except (KeeperError, OSError) as error:
        log.warning("there are no copies of this run on other hosts: %s", error)
        return []
