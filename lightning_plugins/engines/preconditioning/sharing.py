"""Who inverts what: blocks over ranks by cost, and how many ranks keep an inverse.

With ``W`` ranks and a worker fraction ``f``, ``w = f W`` ranks keep the inverse of a block and precondition its gradient
themselves; the others receive the result from one of them. ``f = 1`` broadcasts inverses at each refresh and nothing else;
``f = 1/W`` keeps one copy in all and broadcasts every preconditioned gradient. Paper: Pauloski et al., "KAISA", SC 2021. Ranks
form a grid of ``w`` rows and ``W / w`` columns; a column keeps the inverses of its blocks, and a row passes directions on.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins._support.errors import InputError


def share_by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """Return an owner per task: the largest first, each to the rank that has least so far (longest processing time first)."""
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[task] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[task]] += costs[task]
    return owners


class Sharing:
    """The share of one rank.

    Args:
        group: of all ranks, or None for a single process.
        worker_fraction: in (0, 1]; ``worker_fraction * ranks`` is a whole number that divides the ranks.
        costs: of refreshing each block.

    Raises:
        InputError: if the fraction does not fit the ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, worker_fraction: float, costs: Sequence[float]) -> None:
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.workers = _workers(worker_fraction, self.ranks)
        self.owners = share_by_cost(costs, self.ranks)
        self._row: dist.ProcessGroup | None = None
        self._column: dist.ProcessGroup | None = None
        if group is not None and self.ranks > 1:
            members = dist.get_process_group_ranks(group)
            columns = self.ranks // self.workers
            # Every rank must take part in making every group.
            for column in range(columns):
                made = dist.new_group([members[rank] for rank in range(self.ranks) if rank % columns == column])
                self._column = made if self.rank % columns == column else self._column
            for row in range(self.workers):
                made = dist.new_group([members[rank] for rank in range(self.ranks) if rank // columns == row])
                self._row = made if self.rank // columns == row else self._row

    def owns(self, block: int) -> bool:
        """Whether this rank refreshes a block."""
        return self.owners[block] == self.rank

    def works_on(self, block: int) -> bool:
        """Whether this rank keeps the inverse of a block and preconditions its gradient."""
        columns = self.ranks // self.workers
        return self.rank % columns == self.owners[block] % columns

    def add(self, tensors: Sequence[Tensor], *, symmetric: bool = False) -> None:
        """Add tensors over all ranks, in place; ``symmetric`` sends the upper triangles of matrices alone."""
        if self.group is not None and self.ranks > 1 and tensors:
            _reduce_packed(tensors, self.group, symmetric)

    def share_derived(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Send what the owner of a block made to the others that keep it, in place."""
        if self._column is not None and self.workers > 1 and self.works_on(block):
            for tensor in tensors:
                sent = tensor.contiguous()  # backends send memory as it lies: a factorisation's columns would arrive as rows
                dist.broadcast(sent, self._global(self.owners[block]), group=self._column)
                if sent is not tensor and self.owns(block):
                    tensor.data = sent  # products round differently in another layout, and replicas must stay the same to the bit
                elif sent is not tensor:
                    tensor.copy_(sent)

    def share_directions(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Send what the workers of a block computed to the ranks of their rows, in place."""
        columns = self.ranks // self.workers
        if self._row is not None and columns > 1:
            source = self.rank // columns * columns + self.owners[block] % columns
            for tensor in tensors:
                dist.broadcast(tensor, self._global(source), group=self._row)

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)


def _workers(fraction: float, ranks: int) -> int:
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"worker_fraction must be in (0, 1], got {fraction}; 1 keeps every inverse on every rank")
    workers = max(1, round(fraction * ranks))
    if ranks % workers:
        valid = ", ".join(f"{count}/{ranks}" for count in range(1, ranks + 1) if ranks % count == 0)
        raise InputError(
            f"worker_fraction {fraction} of {ranks} ranks is {workers} ranks, which do not divide them; valid are {valid}"
        )
    return workers


def _reduce_packed(tensors: Sequence[Tensor], group: dist.ProcessGroup, symmetric: bool) -> None:
    """All-reduce as one flat tensor per dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        chosen = [tensor for tensor in tensors if tensor.dtype == dtype]
        triangles = [symmetric and tensor.ndim > 1 for tensor in chosen]
        parts = [_upper(tensor) if triangle else tensor.flatten() for tensor, triangle in zip(chosen, triangles, strict=True)]
        packed = torch.cat(parts)
        dist.all_reduce(packed, group=group)
        for tensor, triangle, part in zip(chosen, triangles, packed.split([len(part) for part in parts]), strict=True):
            if triangle:
                _fill_symmetric(tensor, part)
            else:
                tensor.copy_(part.view_as(tensor))


def _upper(tensor: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(tensor.shape[-1], tensor.shape[-1], device=tensor.device)
    return tensor[..., rows, columns].flatten()


def _fill_symmetric(tensor: Tensor, packed: Tensor) -> None:
    rows, columns = torch.triu_indices(tensor.shape[-1], tensor.shape[-1], device=tensor.device)
    upper = packed.view(*tensor.shape[:-2], -1)
    tensor[..., rows, columns] = upper
    tensor[..., columns, rows] = upper
