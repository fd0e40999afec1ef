"""Nothing is lost and nothing is sent twice: residuals and result add up to what there was, to the last bit.

Gradients are whole numbers, so that every sum is exact, in any order and any precision.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from tests.engines.sparse_allreduce import threads
from tests.engines.sparse_allreduce.cases import Case, gradient, play

CODES = ("int32", "delta16", "bitmap", "auto")
WAYS = list(itertools.product(CODES, ("exact", "bfloat16"), ("histogram", "average")))


def check(case, count, per_rank):
    """Compare the totals of each step, in float64, which holds them exactly."""
    before = np.zeros(case.size)
    sent = 0
    for step in range(case.steps):
        for rank in range(count):
            before += gradient(case, rank, count, step)
        update = per_rank[0][step].update.astype(np.float64)
        after = np.sum([of_rank[step].residual.astype(np.float64) for of_rank in per_rank], axis=0)
        assert np.array_equal(update + after, before), f"{case} of {count} ranks, step {step}"
        assert len({of_rank[step].crc for of_rank in per_rank}) == 1
        sent += np.count_nonzero(update)
        before = after
    return sent


@pytest.mark.parametrize(
    ("count", "kind", "threshold"), [(2, "heavy", "servo"), (3, "drifting", "reused"), (2, "random", "sampled")]
)
def test_two_hundred_steps(count, kind, threshold):
    settings = {"threshold": threshold, "threshold_every": 7, "repartition_every": 10}
    case = Case(kind, 500, 30, 200, settings=settings, integers=True)
    (per_rank,) = zip(*threads.run(play, count, [case]), strict=True)
    assert check(case, count, per_rank) > 200 * 15


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 12, 15, 16])
@pytest.mark.parametrize("values", ["exact", "bfloat16"])
def test_reused_thresholds_on_any_number_of_ranks(count, values):
    settings = {"threshold": "reused", "threshold_every": 5, "repartition_every": 3, "values": values}
    case = Case("drifting", 500, 32, 12, settings=settings, integers=True)
    (per_rank,) = zip(*threads.run(play, count, [case]), strict=True)
    assert check(case, count, per_rank) > 12 * 16


def test_two_hundred_steps_over_a_process_group(ranks):
    case = Case("heavy", 500, 30, 200, settings={"threshold_every": 7, "values": "bfloat16"}, integers=True)
    (per_rank,) = zip(*ranks.run(play, 2, [case]), strict=True)
    check(case, 2, per_rank)


@pytest.mark.parametrize("count", [2, 3])
def test_every_code_and_cut(count):
    """Six steps each, the thresholds computed at two of them."""
    cases = [
        Case(kind, 700, 40, 6, settings={"indices": indices, "values": values, "cuts": cuts, "threshold_every": 4}, integers=True)
        for (indices, values, cuts), kind in zip(WAYS, itertools.cycle(["random", "disjoint", "one_region"]), strict=False)
    ]
    results = threads.run(play, count, cases)
    for number, case in enumerate(cases):
        check(case, count, [of_rank[number] for of_rank in results])


def through_all_ways(rank, count, case):
    """Change code and cuts every few steps, with thresholds and residual carried on."""
    acc = torch.zeros(case.size, dtype=torch.float64)
    state = SparseAllreduceState(threshold_every=5)
    totals = []
    for step in range(case.steps):
        if step % 4 == 0:
            indices, values, cuts = WAYS[step // 4 % len(WAYS)]
            carried = state.state_dict()
            state = SparseAllreduceState(indices=indices, values=values, cuts=cuts, threshold_every=5)
            state.load_state_dict(carried)
        acc += torch.from_numpy(gradient(case, rank, count, step))
        before = acc.clone()
        update = sparse_allreduce(acc, case.k, state=state)
        totals.append((before.numpy(), acc.numpy().copy(), update.numpy()))
    return totals


def test_the_way_may_change_between_steps():
    case = Case("heavy", 600, 40, 4 * len(WAYS), "float64", integers=True)
    per_rank = threads.run(through_all_ways, 3, case)
    for step in range(case.steps):
        before, after = (sum(of_rank[step][i] for of_rank in per_rank) for i in (0, 1))
        assert np.array_equal(per_rank[0][step][2] + after, before), step


def skips_a_step(rank, count):
    state = SparseAllreduceState(threshold_every=3)
    acc = torch.arange(40.0) * (rank + 1)
    total = torch.zeros(40)
    for step in range(6):
        if step == 2:
            broken = acc.clone()
            broken[rank] = float("nan")
            with pytest.raises(FloatingPointError):
                sparse_allreduce(broken, 8, state=state)
        total += sparse_allreduce(acc, 8, state=state)
    return acc.numpy(), total.numpy(), state.step


def test_a_skipped_step_loses_nothing():
    results = threads.run(skips_a_step, 2)
    assert np.array_equal(sum(acc for acc, _, _ in results) + results[0][1], np.arange(40.0) * 3)
    assert [step for _, _, step in results] == [6, 6]


def overflows(rank, count, values):
    acc = torch.tensor([1.0, 3e38, -2.0, 0.5])
    before = acc.clone()
    state = SparseAllreduceState(values=values)
    with pytest.raises(FloatingPointError):
        sparse_allreduce(acc, 3, state=state)
    return torch.equal(acc, before), state.step


@pytest.mark.parametrize("values", ["exact", "bfloat16"])
def test_a_sum_that_overflows_leaves_the_residuals(values):
    """Finite on every rank, and infinite together: an update of infinity, and a residual of it, would never go away."""
    assert threads.run(overflows, 3, values) == [(True, 0)] * 3


def in_a_group(rank, count):
    """Two groups side by side, each with ranks of its own."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    acc = torch.arange(20.0) + rank
    update = sparse_allreduce(acc, 5, group=groups[rank % 2])
    return update.numpy(), acc.numpy()


def test_within_a_group(ranks):
    results = ranks.run(in_a_group, 4)
    for first, second in ((0, 2), (1, 3)):
        assert np.array_equal(results[first][0], results[second][0])
        residuals = results[first][1] + results[second][1]
        assert np.array_equal(results[first][0] + residuals, 2 * np.arange(20.0) + first + second)
