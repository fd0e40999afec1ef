"""Every bit of update, residuals and thresholds against a computation on one process, for any number of ranks."""

import numpy as np
import pytest

from tests.engines.sparse_allreduce import threads
from tests.engines.sparse_allreduce.cases import Case, gradient, play
from tests.engines.sparse_allreduce.oracle import Oracle

KINDS = ("random", "equal", "zeros", "single", "same_place", "denormal", "cancel", "ties", "one_rank", "one_region", "shifted")


def check(cases, ranks, results):
    """Follow each case step by step beside the ranks, and compare bits."""
    for number, case in enumerate(cases):
        _check(case, ranks, [of_rank[number] for of_rank in results])


def _check(case, ranks, per_rank):
    settings = case.settings
    rounded = settings.get("values") == "bfloat16"
    oracle = Oracle(case.k, settings.get("threshold", "servo"), settings.get("threshold_every", 32), rounded)
    accs = [np.zeros(case.size, case.dtype) for _ in range(ranks)]
    for step in range(case.steps):
        played = [of_rank[step] for of_rank in per_rank]
        accs = [acc + gradient(case, rank, ranks, step) for rank, acc in enumerate(accs)]
        owner = np.repeat(played[0].owners, np.diff(played[0].cuts)) if rounded else None
        update, accs = oracle.allreduce(accs, owner)
        where = f"{case} of {ranks} ranks, step {step}"
        assert np.array_equal(played[0].update, update), where
        assert len({of_rank.crc for of_rank in played}) == 1, where
        for rank, (of_rank, residual) in enumerate(zip(played, accs, strict=True)):
            assert np.array_equal(of_rank.residual, residual), f"residual of rank {rank}, {where}"
            assert of_rank.thresholds == (oracle.local[rank], oracle.overall), f"thresholds of rank {rank}, {where}"
            assert (of_rank.cuts, of_rank.owners) == (played[0].cuts, played[0].owners), where


def one_step_cases(ranks):
    """Return all kinds of gradients; fewer elements than ranks, one element, all of them asked for, more than there are."""
    kinds = KINDS if ranks < 8 else KINDS[ranks % 2 :: 2]  # they take turns where there are many ranks
    cases = [Case(kind, 300, 5 * ranks) for kind in kinds]
    cases += [Case("random", size, ranks, 2) for size in (1, max(1, ranks - 1), ranks)]
    return [*cases, Case("ties", 40, 40, 2), Case("random", 40, 1000, 2), Case("random", 300, 2 * ranks, 2, "float64")]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 15, 16])
def test_equals_the_computation_on_one_process(count):
    cases = one_step_cases(count)
    check(cases, count, threads.run(play, count, cases))


@pytest.mark.parametrize(("count", "steps"), [(2, 12), (4, 6)])
@pytest.mark.parametrize("threshold", ["exact", "reused", "servo", "sampled"])
def test_over_several_steps(count, steps, threshold):
    settings = {"threshold": threshold, "threshold_every": 5, "repartition_every": 3}
    kinds = ("random", "ties", "cancel", "drifting", "moved", "denormal", "zeros")
    cases = [Case(kind, 400, 24, steps, settings=settings) for kind in kinds]
    cases.append(Case("heavy", 400, 24, steps, "float64", settings))
    check(cases, count, threads.run(play, count, cases))


@pytest.mark.parametrize("count", [3, 5, 6, 7, 12, 15, 16, 18])
@pytest.mark.parametrize("threshold", ["reused", "servo"])
def test_between_exact_thresholds_on_any_number_of_ranks(count, threshold):
    """Two steps of six compute thresholds, the others use them again or follow the count."""
    settings = {"threshold": threshold, "threshold_every": 4, "repartition_every": 3}
    cases = [Case(kind, 400, 24, 6, settings=settings) for kind in ("random", "drifting", "cancel")]
    check(cases, count, threads.run(play, count, cases))


def test_whatever_the_route_and_the_wire():
    """Cuts, owners and codes change who adds and how it is written, and no bit of what comes out."""
    routes = [{"cuts": cuts, "owners": owners} for cuts in ("histogram", "average") for owners in ("local", "rank")]
    codes = [
        {"indices": indices, "values": values}
        for indices in ("int32", "delta16", "bitmap", "auto")
        for values in ("exact", "bfloat16")
    ]
    cases = [Case(kind, 500, 30, 2, settings=more) for more in [*routes, *codes] for kind in ("heavy", "lopsided", "denormal")]
    check(cases, 3, threads.run(play, 3, cases))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_over_a_process_group(ranks, count):
    """What the threads above show holds with gloo."""
    cases = [*one_step_cases(count)[::4], Case("heavy", 400, 24, 4, settings={"threshold_every": 2})]
    check(cases, count, ranks.run(play, count, cases))


def test_sixteen_processes(ranks):
    cases = [Case("random", 2000, 40, 2, settings={"threshold_every": 2})]
    check(cases, 16, ranks.run(play, 16, cases))
