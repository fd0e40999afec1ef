"""The collectives of a sparse allreduce over one process group, each counted in bytes and seconds.

Bytes are those that cross from one rank to another: what a rank keeps for itself costs nothing. An all-reduce of b bytes is
counted as the 2 b (P - 1) / P, sent and received, that no algorithm can go below for long vectors.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce._seams import wire_device


class Traffic:
    """What a rank has sent and received, and how long it took, by phase.

    Attributes:
        sent_bytes: by phase.
        received_bytes: by phase.
        seconds: by phase, waiting for others included.
    """

    def __init__(self) -> None:
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self.received_bytes: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)

    def count(self, phase: str, sent_bytes: int, received_bytes: int) -> None:
        """Add to a phase."""
        self.sent_bytes[phase] += sent_bytes
        self.received_bytes[phase] += received_bytes

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase; on a GPU the phases end where the host waits for counts."""
        start_s = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start_s

    def total_bytes(self) -> tuple[int, int]:
        """Return the bytes sent and received in all phases."""
        return sum(self.sent_bytes.values()), sum(self.received_bytes.values())

    def clear(self) -> None:
        """Start counting anew."""
        self.sent_bytes.clear()
        self.received_bytes.clear()
        self.seconds.clear()


def counting_type(most: int) -> torch.dtype:
    """Return the integers in which counts up to ``most`` are added up over the ranks."""
    return torch.int32 if most < 1 << 31 else torch.int64


class Exchange:
    """The ranks of a group.

    Args:
        group: None stands for the default group, or for a single rank where none was made.
        device: of the tensors that are exchanged; a gloo group gets copies of them in host memory.
        traffic: counts what is sent; a new one if it is left out.

    Attributes:
        wire_device: where tensors have to be for the group to send them.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, traffic: Traffic | None = None) -> None:
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.ranks = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        self.device = device
        self.wire_device = device if alone else wire_device(group, device)
        self.traffic = Traffic() if traffic is None else traffic

    def all_to_all_integers(self, rows: Sequence[Sequence[int]], phase: str) -> list[list[int]]:
        """Send row r, of as many integers for each, to rank r; return the rows received, by source."""
        if self.ranks == 1:
            return [list(row) for row in rows]
        sent = torch.tensor(rows, dtype=torch.int64, device=self.wire_device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        others = (self.ranks - 1) * len(rows[0]) * 8
        self.traffic.count(phase, others, others)
        return received.tolist()

    def all_gather_integers(self, row: Sequence[int], phase: str) -> list[list[int]]:
        """Return the row of every rank, by rank."""
        if self.ranks == 1:
            return [list(row)]
        sent = torch.tensor(row, dtype=torch.int64, device=self.wire_device)
        received = torch.empty(self.ranks * len(row), dtype=torch.int64, device=self.wire_device)
        dist.all_gather_into_tensor(received, sent, group=self.group)
        others = (self.ranks - 1) * len(row) * 8
        self.traffic.count(phase, others, others)
        return received.view(self.ranks, len(row)).tolist()

    def all_to_all_bytes(self, messages: Sequence[Tensor], lengths: Sequence[int], phase: str) -> list[Tensor]:
        """Send message r, ``uint8``, to rank r; return those received, by source, on the exchange's device.

        Args:
            messages: one for each rank; empty ones are allowed.
            lengths: bytes that come from each rank.
            phase: to count for.
        """
        if self.ranks == 1:
            return list(messages)
        sizes = [len(message) for message in messages]
        sent = torch.cat(list(messages)).to(self.wire_device)
        received = torch.empty(sum(lengths), dtype=torch.uint8, device=self.wire_device)
        dist.all_to_all_single(received, sent, list(lengths), sizes, group=self.group)
        self.traffic.count(phase, sum(sizes) - sizes[self.rank], sum(lengths) - lengths[self.rank])
        return list(received.to(self.device).split(list(lengths)))

    def all_gather_bytes(self, message: Tensor, lengths: Sequence[int], phase: str) -> list[Tensor]:
        """Return the message, ``uint8``, of every rank; all are padded to the longest on their way."""
        if self.ranks == 1:
            return [message]
        longest = max(lengths)
        if longest == 0:
            return [message] * self.ranks
        sent = torch.zeros(longest, dtype=torch.uint8, device=self.wire_device)
        sent[: len(message)] = message
        received = torch.empty(self.ranks * longest, dtype=torch.uint8, device=self.wire_device)
        dist.all_gather_into_tensor(received, sent, group=self.group)
        others = (self.ranks - 1) * longest
        self.traffic.count(phase, others, others)
        parts = received.to(self.device).view(self.ranks, longest)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def add(self, tensor: Tensor, phase: str) -> Tensor:
        """Return the sum of a tensor over the ranks, the same bits on each; the tensor may be changed."""
        return self._reduced(tensor, phase, dist.ReduceOp.SUM)

    def largest_integers(self, values: Sequence[int], phase: str) -> list[int]:
        """Return the largest of each value over the ranks."""
        return self._reduced(torch.tensor(values, dtype=torch.int64), phase, dist.ReduceOp.MAX).tolist()

    def all_gather_text(self, text: str) -> list[str]:
        """Return a text of every rank; nothing that arrives is run or unpickled."""
        message = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8).to(self.device)
        lengths = [length for (length,) in self.all_gather_integers([len(message)], "agreement")]
        parts = self.all_gather_bytes(message, lengths, "agreement")
        return [json.loads(bytes(part.cpu().numpy())) for part in parts]

    def _reduced(self, tensor: Tensor, phase: str, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        if self.ranks == 1:
            return tensor
        device = tensor.device
        moved = tensor.to(self.wire_device)
        dist.all_reduce(moved, operation, group=self.group)
        others = 2 * moved.nbytes * (self.ranks - 1) // self.ranks
        self.traffic.count(phase, others, others)
        return moved.to(device)
