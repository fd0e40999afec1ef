"""Gradients with adversarial supports, and the function that the ranks run over them: the same numbers in ranks and in tests."""

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce

DENORMAL = 2.0**-149
PHASES = ("split_and_reduce", "balance", "allgather")


class Case(NamedTuple):
    """Some steps of one state.

    Attributes:
        kind: of gradient, a name in ``gradient``.
        size: of the vector.
        k: what is asked for.
        steps: how many.
        dtype: ``float32`` or ``float64``.
        settings: of the state.
        integers: whether gradients are whole numbers, so that every sum is exact.
        seed: of the gradients.
    """

    kind: str
    size: int
    k: int
    steps: int = 1
    dtype: str = "float32"
    settings: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    integers: bool = False
    seed: int = 0


class Moved(NamedTuple):
    """What a step of a rank has cost.

    Attributes:
        sent: bytes by phase.
        received: bytes by phase.
        selected: entries of this rank.
        most_selected: of any rank.
        granularity: of the cuts.
        partitions: cuts made so far.
        counts: entries of this rank in each region, by its own selection.
        exact: whether thresholds were computed.
    """

    sent: dict[str, int]
    received: dict[str, int]
    selected: int
    most_selected: int
    granularity: int
    partitions: int
    counts: list[int]
    exact: bool

    def words(self, way: str) -> float:
        """Return the words of the two phases, ``sent`` or ``received``."""
        return sum(getattr(self, way).get(phase, 0) for phase in PHASES) / 4


class Played(NamedTuple):
    """What a rank had after a step.

    Attributes:
        crc: of the update's bytes.
        update: ``(n,)``, of rank 0 alone.
        residual: ``(n,)``, or None where it was not asked for.
        thresholds: local and global.
        cuts: of the regions.
        owners: of the regions.
    """

    crc: int
    update: Any
    residual: Any
    thresholds: tuple[float, float]
    cuts: list[int]
    owners: list[int]


def gradient(case: Case, rank: int, ranks: int, step: int) -> np.ndarray:
    """Return a rank's gradient of a step, ``(size,)``."""
    size, dtype = case.size, np.dtype(case.dtype)
    generator = np.random.default_rng([case.seed, rank, step])
    if case.kind == "random":
        values = generator.standard_normal(size)
    elif case.kind == "equal":
        values = np.full(size, 1.5)
    elif case.kind == "zeros":
        values = np.zeros(size)
    elif case.kind == "single":
        values = np.zeros(size)
        values[7 * rank % size] = rank + 1
    elif case.kind == "same_place":
        values = np.zeros(size)
        values[size // 2] = rank + 1
    elif case.kind == "denormal":
        return (generator.integers(-9, 10, size) * dtype.type(DENORMAL)).astype(dtype)
    elif case.kind == "cancel":  # in pairs of ranks
        values = np.random.default_rng([case.seed, rank // 2, step]).standard_normal(size) * (-1) ** rank
    elif case.kind == "ties":
        values = generator.integers(-3, 4, size)
    elif case.kind == "lopsided":  # shifted, and what is largest of all lies in one region
        values = generator.standard_normal(size) * _inside("shifted", size, rank, ranks, step) * (10.0 if rank == 0 else 1.0)
    elif case.kind == "no_owners":  # of three ranks: the first has the most of two regions, no other has a third of either
        share = ((0.4, 0.4, 0.2), (0.3, 0.3, 0.4), (0.3, 0.3, 0.4))[rank]
        places = np.arange(size)
        values = 1.0 * (places % (size // 3) < case.k * np.repeat(share, -(-size // 3))[:size])
    elif case.kind == "one_rank":
        values = generator.standard_normal(size) * (rank == ranks - 1)
    elif case.kind == "heavy":  # tails of a power law
        values = generator.standard_t(2, size)
    else:
        values = generator.standard_normal(size) * _inside(case.kind, size, rank, ranks, step)
    if case.integers:
        values = np.trunc(values * 64)
    return np.asarray(values).astype(dtype)


def _inside(kind: str, size: int, rank: int, ranks: int, step: int) -> np.ndarray:
    """Return where a rank's entries lie, ``(size,)``."""
    places = np.arange(size)
    part = places * ranks // size
    if kind == "one_region":
        return places * ranks * 4 // size == ranks
    if kind == "disjoint":
        return part == rank
    if kind == "shifted":  # nobody holds anything of the part with its own number
        return part == (rank + 1) % ranks
    if kind == "drifting":
        width = max(1, size // (2 * ranks))
        return (places - (rank * size // ranks + step * width // 2)) % size < width
    if kind == "gathering":  # all over the vector, and then all of it in one place
        return places < (size if step == 0 else size // (8 * ranks))
    if kind == "moved":  # disjoint, and then all of it somewhere else
        return part == (rank + step) % ranks
    raise ValueError(f"there is no gradient called {kind}")


def play(rank: int, ranks: int, cases: list[Case], with_residuals: bool = True) -> list[list[Played]]:
    """Run the steps of each case, with error feedback, as one rank."""
    return [_play(case, rank, ranks, with_residuals) for case in cases]


def _play(case: Case, rank: int, ranks: int, with_residuals: bool) -> list[Played]:
    state = SparseAllreduceState(**case.settings)
    acc = torch.zeros(case.size, dtype=getattr(torch, case.dtype))
    played = []
    for step in range(case.steps):
        acc += torch.from_numpy(gradient(case, rank, ranks, step))
        update = sparse_allreduce(acc, case.k, state=state)
        routing = state.routings[0]
        played.append(
            Played(
                zlib.crc32(update.numpy().tobytes()),
                update.numpy() if rank == 0 else None,
                acc.numpy().copy() if with_residuals else None,
                (state.local.value, state.overall.value),
                list(routing.cuts),
                list(routing.owners),
            )
        )
    return played


def measure(rank: int, ranks: int, case: Case) -> list[Moved]:
    """Run the steps of a case with error feedback and count what each costs."""
    state = SparseAllreduceState(**case.settings)
    acc = torch.zeros(case.size, dtype=getattr(torch, case.dtype))
    moved = []
    for step in range(case.steps):
        acc += torch.from_numpy(gradient(case, rank, ranks, step))
        before = acc.clone()
        state.traffic.clear()
        exact = state.due
        sparse_allreduce(acc, case.k, state=state)
        routing, report = state.routings[0], state.report
        # With exact thresholds the selection is known: what a sort would give.
        chosen = before.abs().topk(min(case.k, case.size)).indices.sort().values
        moved.append(
            Moved(
                dict(state.traffic.sent_bytes),
                dict(state.traffic.received_bytes),
                report.selected,
                report.most_selected,
                routing.granularity,
                routing.partitions,
                routing.split(chosen),
                exact,
            )
        )
    return moved
