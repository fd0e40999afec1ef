"""The ranks' side of ``ok_topk_calibration.py``: dense and sparse reductions over shaped links, and what was selected."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _ok_topk import Gradients
from _ok_topk_network import DENSITY, shape

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.selection import select, trim
from tests.ranks.hosts import Host

WARM_UP, STEPS = 8, 7
# Thresholds and cuts are computed in the first step alone: what is timed and simulated is a step that follows them.
SETTINGS = {"threshold": "servo", "threshold_every": 1000, "repartition_every": 1000, "indices": "int32", "values": "exact"}
PHASES = ("split_and_reduce", "balance", "allgather")  # in which entries travel


@dataclass
class Timings:
    """What a number of ranks took, by bandwidth in Mbit/s; None is unshaped.

    Attributes:
        dense_s: by bytes of the buffer, medians of the slowest rank.
        sparse: by elements of the vector, of Ok-Topk.
    """

    dense_s: dict[float | None, dict[int, float]] = field(default_factory=dict)
    sparse: dict[int, "Sparse"] = field(default_factory=dict)


@dataclass
class Sparse:
    """Steps of Ok-Topk over a vector.

    Attributes:
        seconds: by bandwidth, medians of the slowest rank.
        words: of four bytes that this rank sent or received, whichever is more, in each phase of the last step.
        chosen: sorted indices that this rank selected in that step.
        final: sorted indices of its result.
    """

    seconds: dict[float | None, float] = field(default_factory=dict)
    words: dict[str, float] = field(default_factory=dict)
    chosen: Any = None
    final: Any = None


def measure(rank: int, ranks: int, hosts: list[Host], bandwidths: list[float], sizes: list[int], lengths: list[int]) -> Timings:
    """Time dense and sparse reductions at every bandwidth."""
    found = Timings()
    for bandwidth in bandwidths:
        shape(rank, hosts, bandwidth)
        found.dense_s[bandwidth] = {size: _dense_s(size) for size in sizes}
    found.sparse = {length: _sparse(rank, hosts, bandwidths, length) for length in lengths}
    return found


def _sparse(rank: int, hosts: list[Host], bandwidths: list[float], elements: int) -> Sparse:
    found = Sparse()
    gradients, state = Gradients(elements, rank), SparseAllreduceState(**SETTINGS)
    acc, k = torch.zeros(elements), round(DENSITY * elements)

    def step() -> None:
        threshold = state.local.value
        if threshold is not None:
            chosen = select(acc, threshold)
            found.chosen = trim(chosen, acc[chosen], k)[0].numpy()
        state.traffic.clear()
        dist.barrier()
        start_s = time.perf_counter()
        result = sparse_allreduce(acc, k, state=state)
        taken.append(time.perf_counter() - start_s)
        found.final = np.flatnonzero(result.numpy())

    taken: list[float] = []
    shape(rank, hosts, None)
    for _ in range(WARM_UP):
        acc += gradients.next()
        step()
    for bandwidth in (None, *bandwidths):
        shape(rank, hosts, bandwidth)
        taken.clear()
        for _ in range(STEPS):
            acc += gradients.next()
            step()
        found.seconds[bandwidth] = _slowest_median(taken)
    traffic = state.traffic
    found.words = {name: max(traffic.sent_bytes[name], traffic.received_bytes[name]) / 4 for name in PHASES}
    shape(rank, hosts, None)
    return found


def _dense_s(size_bytes: int) -> float:
    buffer = torch.ones(size_bytes // 4)
    return _timed(lambda: dist.all_reduce(buffer.fill_(1.0)))


def _timed(job: Callable[[], Any]) -> float:
    taken = []
    for _ in range(1 + STEPS):
        dist.barrier()
        start_s = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start_s)
        spent_s = torch.tensor(sum(taken))
        dist.all_reduce(spent_s, dist.ReduceOp.MAX)  # all ranks have to stop at the same repetition
        if float(spent_s) > 10:  # slow enough to be measured by few
            break
    return _slowest_median(taken[1:] or taken)


def _slowest_median(taken: list[float]) -> float:
    """Return the median over the repetitions of the slowest rank's seconds."""
    seconds = torch.tensor(taken, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return statistics.median(seconds.tolist())
