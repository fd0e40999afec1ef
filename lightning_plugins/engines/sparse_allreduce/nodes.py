"""Two levels: dense inside a node, sparse between nodes.

Inside a node a bucket is reduce-scattered: of each parameter, rank l of the node gets the l-th of equal chunks, summed over the
node. Between nodes, ranks with the same l reduce their chunks sparsely, each with its own residual; inside the node the results
are gathered. With one rank in a node nothing is scattered, and a chunk is the whole parameter.
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce._seams import wire_device


class Nodes:
    """The two groups of a rank.

    Args:
        group: all ranks, those of a node side by side.
        ranks_per_node: how many.
        timeout: of the groups made here.
        device: of the buckets.

    Raises:
        InputError: if they do not divide the ranks, or all are on one node.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, ranks_per_node: int, timeout: timedelta | None, device: torch.device
    ) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if ranks_per_node < 1 or ranks % ranks_per_node or (ranks_per_node > 1 and ranks == ranks_per_node):
            raise InputError(
                f"ranks_per_node must divide the {ranks} ranks into two nodes or more, got {ranks_per_node}; 1 is one level alone"
            )
        self.ranks, self.rank = ranks, rank
        self.inside, self.place = ranks_per_node, rank % ranks_per_node
        members = dist.get_process_group_ranks(group) if group is not None else list(range(ranks))
        # Every rank has to take part in making every group.
        for place in range(ranks_per_node):
            made = dist.new_group(members[place::ranks_per_node], timeout=timeout)
            if place == self.place:
                self.between = made
        self._node: dist.ProcessGroup | None = None
        self._wire_device = wire_device(group, device)
        for first in range(0, ranks, ranks_per_node) if ranks_per_node > 1 else ():
            made = dist.new_group(members[first : first + ranks_per_node], timeout=timeout)
            if first <= rank < first + ranks_per_node:
                self._node = made
        self.groups = [made for made in (self.between, self._node) if made is not None]

    def chunk(self, size: int) -> int:
        """Return the elements of a rank's chunk of a parameter; the last chunks may be padded."""
        return -(-size // self.inside)

    def scatter(self, bucket: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this rank's chunks of a bucket's parameters, end to end, summed over the node, first rank first."""
        if self._node is None:
            return bucket
        rows = torch.cat([_in_rows(part, self.inside, self.chunk(len(part))) for part in bucket.split(list(sizes))], dim=1)
        rows = rows.to(self._wire_device).contiguous()
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self._node)
        received = received.to(bucket.device)
        total = received[0]
        for row in received[1:]:
            total += row
        return total

    def gather(self, chunks: Tensor, sizes: Sequence[int], bucket: Tensor) -> None:
        """Fill a bucket with the chunks of all ranks of the node."""
        if self._node is None:
            bucket.copy_(chunks)
            return
        rows = torch.empty(self.inside, len(chunks), dtype=chunks.dtype, device=self._wire_device)
        dist.all_gather_into_tensor(rows.view(-1), chunks.to(self._wire_device).contiguous(), group=self._node)
        parts = rows.to(bucket.device).split([self.chunk(size) for size in sizes], dim=1)
        torch.cat([part.reshape(-1)[:size] for part, size in zip(parts, sizes, strict=True)], out=bucket)


def _in_rows(part: Tensor, rows: int, chunk: int) -> Tensor:
    """Return a parameter as ``(rows, chunk)``, padded with zeros at its end."""
    return torch.nn.functional.pad(part, (0, rows * chunk - len(part))).view(rows, chunk)
