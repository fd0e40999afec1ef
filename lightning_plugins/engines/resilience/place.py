"""Which rank of a job this is, and on which of its hosts."""

from typing import NamedTuple

from lightning_plugins.engines.resilience.shards import SHARED, own_shard


class Place(NamedTuple):
    """Which rank this is.

    Attributes:
        rank: among all.
        local_rank: on this host.
        ranks: their number.
        node: number of this host.
        nodes: number of hosts.
        toward: address of rank 0's host.
    """

    rank: int
    local_rank: int
    ranks: int
    node: int = 0
    nodes: int = 1
    toward: str = "127.0.0.1"

    @property
    def is_first_of_node(self) -> bool:
        """Whether this rank acts for its host."""
        return self.local_rank == 0

    @property
    def shards_to_disk(self) -> list[str]:
        """What of a step this host brings to disk: its ranks' own, and node 0 what all share."""
        each = self.ranks // self.nodes
        own = [own_shard(rank) for rank in range(self.node * each, (self.node + 1) * each)]
        return [SHARED, *own] if self.node == 0 else own
