"""Threads that stand for ranks: ``run(function, 5)`` calls ``function(rank, 5)`` in five threads of this process.

What the engine asks of ``torch.distributed`` goes over shared memory meanwhile. A step of 16 ranks then takes 50 ms where 16
processes that share two cores take a second, so hundreds of cases can be looked at; that real process groups do the same is
shown on fewer. It is stricter than a process group: ranks that call different collectives, or of different shapes, fail at once.
"""

import queue
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins.engines.sparse_allreduce import exchange, rivals

PATIENCE_S = 20.0


class Transfer(NamedTuple):
    """What stands for ``dist.P2POp``."""

    direction: str
    tensor: Tensor
    peer: int
    group: object = None


class Done:
    """A finished operation."""

    def wait(self) -> None:
        """Return at once."""


class SharedMemory:
    """The part of ``torch.distributed`` that the engine uses.

    Args:
        ranks: how many threads take part.
    """

    ReduceOp = dist.ReduceOp
    ProcessGroup = dist.ProcessGroup
    P2POp = Transfer
    isend, irecv = "send", "receive"

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.here = threading.local()
        self.barrier = threading.Barrier(ranks)
        self.turn = threading.Lock()  # one rank computes at a time: several would only fight for the interpreter
        self._slots: list[Any] = [None] * ranks
        self._mail: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: object = None) -> int:
        return self.ranks

    def get_rank(self, group: object = None) -> int:
        return self.here.rank

    def get_global_rank(self, group: object, rank: int) -> int:
        return rank

    def all_reduce(self, tensor: Tensor, op: Any, group: object = None) -> None:
        rows = torch.stack(self._meet(("all_reduce", tensor.shape, tensor.dtype), tensor.clone()))
        tensor.copy_(rows.sum(0) if op == dist.ReduceOp.SUM else rows.amax(0))

    def all_gather_into_tensor(self, output: Tensor, sent: Tensor, group: object = None) -> None:
        output.copy_(torch.cat(self._meet(("all_gather", sent.shape, sent.dtype), sent.clone())))

    def all_to_all_single(
        self, output: Tensor, sent: Tensor, lengths: Any = None, sizes: Any = None, group: object = None
    ) -> None:
        parts = sent.clone().split(sizes) if sizes else sent.clone().chunk(self.ranks)
        received = [of_source[self.here.rank] for of_source in self._meet(("all_to_all", sent.dtype), parts)]
        assert lengths is None or lengths == [len(part) for part in received], "a rank expects another length than is sent"
        output.copy_(torch.cat(received))

    def batch_isend_irecv(self, transfers: list[Transfer]) -> list[Done]:
        me = self.here.rank
        for transfer in transfers:
            if transfer.direction == "send":
                self._mail[me, transfer.peer].put(transfer.tensor.clone())
        for transfer in transfers:
            if transfer.direction == "receive":
                arrived = self._waited(lambda mail=self._mail[transfer.peer, me]: mail.get(timeout=PATIENCE_S))
                assert arrived.shape == transfer.tensor.shape, "a rank expects another length than is sent"
                transfer.tensor.copy_(arrived)
        return [Done() for _ in transfers]

    def _meet(self, what: tuple[Any, ...], value: Any) -> list[Any]:
        self._slots[self.here.rank] = (what, value)
        self._waited(lambda: self.barrier.wait(PATIENCE_S))
        seen = list(self._slots)
        self._waited(lambda: self.barrier.wait(PATIENCE_S))
        assert all(other == what for other, _ in seen), f"ranks call different collectives: {[other for other, _ in seen]}"
        return [value for _, value in seen]

    def _waited(self, wait: Callable[[], Any]) -> Any:
        self.turn.release()
        try:
            return wait()
        finally:
            self.turn.acquire()


def run(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(rank, ranks, *args)`` in a thread for each rank and return what each returned.

    Raises:
        AssertionError: with the traceback of the first rank that failed by itself.
    """
    memory = SharedMemory(ranks)
    failures: list[str] = []

    def call(rank: int) -> Any:
        memory.here.rank = rank
        try:
            with memory.turn:
                return function(rank, ranks, *args)
        except threading.BrokenBarrierError:
            return None  # another rank has failed, or does not come
        except BaseException:
            failures.append(f"rank {rank} of {ranks} raised\n{traceback.format_exc()}")
            memory.barrier.abort()
            return None

    with (
        patch.object(exchange, "dist", memory),
        patch.object(exchange, "wire_device", lambda group, device: device),
        patch.object(rivals, "dist", memory),
        ThreadPoolExecutor(ranks) as pool,
    ):
        results = list(pool.map(call, range(ranks)))
    assert not failures, failures[0]
    assert not memory.barrier.broken, "a rank did not come to a collective"
    return results
