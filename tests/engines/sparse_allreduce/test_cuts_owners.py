"""Cuts whose regions are alike whatever the supports look like, and owners that are an optimal assignment."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from lightning_plugins.engines.sparse_allreduce.cuts import FINENESS, average_cuts, histogram_cuts
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.owners import MOST_RANKS, assign_owners, least_cost_assignment
from lightning_plugins.engines.sparse_allreduce.reduction import Routing
from lightning_plugins.engines.sparse_allreduce.settings import Settings
from tests.engines.sparse_allreduce import threads

SIZE = 3_000_017
K = 1000


def supports(kind, count):
    """Return the sorted support of each rank, at most K positions of SIZE."""
    generator = np.random.default_rng([count, len(kind)])
    if kind == "random":
        return [np.sort(generator.choice(SIZE, K, replace=False)) for _ in range(count)]
    if kind == "one_bin":  # neighbours, far below the width of a bin
        return [np.arange(K) + 1_234_567 for _ in range(count)]
    if kind == "one_index":
        return [np.array([777_777]) for _ in range(count)]
    if kind == "last_index":
        return [np.array([SIZE - 1]) for _ in range(count)]
    if kind == "clusters":  # every rank the same few clumps
        return [
            np.concatenate([np.arange(K // 4) + start for start in (0, 5000, 2_000_000, SIZE - K // 4)]) for _ in range(count)
        ]
    if kind == "halving":  # ever denser towards 0
        return [np.unique(((SIZE - 1) * 0.985 ** np.arange(K)).astype(np.int64)) for _ in range(count)]
    if kind == "disjoint":
        return [np.arange(K) * 2 + rank * SIZE // count for rank in range(count)]
    if kind == "one_rank":
        return [np.arange(K) * 7 + 5 if rank == count - 1 else np.empty(0, np.int64) for rank in range(count)]
    if kind == "one_entry":
        return [np.array([4]) if rank == 0 else np.empty(0, np.int64) for rank in range(count)]
    return [np.empty(0, np.int64) for _ in range(count)]


KINDS = ("random", "one_bin", "one_index", "last_index", "clusters", "halving", "disjoint", "one_rank", "one_entry", "empty")


def cut(rank, count, all_kinds):
    exchange = Exchange(None, torch.device("cpu"))
    found = []
    for of_ranks in all_kinds:
        indices = torch.from_numpy(of_ranks[rank])
        found.append((*histogram_cuts(indices, SIZE, K, exchange), average_cuts(indices, SIZE, exchange)))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
def test_no_region_holds_more_than_its_share_and_the_granularity(count):
    all_kinds = [supports(kind, count) for kind in KINDS]
    results = threads.run(cut, count, all_kinds)
    assert all(result == results[0] for result in results)
    for kind, of_ranks, (cuts, granularity, average) in zip(KINDS, all_kinds, results[0], strict=True):
        entries = np.sort(np.concatenate(of_ranks))
        for edges in (cuts, average):
            assert len(edges) == count + 1
            assert (edges[0], edges[-1]) == (0, SIZE)
            assert edges == sorted(edges)
        held = np.diff(np.searchsorted(entries, cuts))
        assert held.sum() == len(entries), kind
        assert granularity <= max(count, K // FINENESS), kind
        assert held.max() <= len(entries) / count + granularity + 1, kind


def test_averaged_quantiles():
    """The published rule, in integers of 64 bits: a rank without a support counts with even cuts."""
    of_ranks = [np.array([10, 20, 30, 40, 50, 60]), np.array([0, 3, 6]), np.empty(0, np.int64)]
    found = threads.run(cut_on_average, 3, of_ranks, 90)
    assert found == [[0, (30 + 3 + 30) // 3, (50 + 6 + 60) // 3, 90]] * 3


def cut_on_average(rank, count, of_ranks, size):
    return average_cuts(torch.from_numpy(of_ranks[rank]), size, Exchange(None, torch.device("cpu")))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_assignments_are_optimal(count):
    generator = np.random.default_rng(count)
    for highest in (1, 3, 10, 1_000_000):
        for _ in range(20):
            cost = generator.integers(0, highest + 1, (count, count))
            owners = least_cost_assignment(cost)
            assert sorted(owners) == list(range(count))
            rows, columns = linear_sum_assignment(cost)
            assert cost[owners, range(count)].sum() == cost[rows, columns].sum()


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_whoever_owns_a_region_holds_its_share_if_that_can_be(count):
    """Against the largest matching of ranks and regions in which the rank holds the mean."""
    generator = np.random.default_rng(count)
    complete = 0
    for _ in range(60):
        counts = generator.integers(0, 200, (count, count)) ** 2 // 100
        owners = assign_owners(counts)
        enough = counts >= counts.sum() // count**2
        if enough[linear_sum_assignment(enough, maximize=True)].all():
            complete += 1
            assert enough[owners, range(count)].all()
        share = np.minimum(counts, counts.sum() // count**2)
        assert share[owners, range(count)].sum() == share[linear_sum_assignment(share, maximize=True)].sum()
    assert complete > 0


def test_very_many_ranks_keep_their_regions():
    counts = np.zeros((MOST_RANKS + 1, MOST_RANKS + 1), np.int64)
    counts[0, 1] = 5
    assert assign_owners(counts) == list(range(MOST_RANKS + 1))
    assert assign_owners(np.array([[0, 9], [9, 0]])) == [1, 0]


def renewed(rank, count, of_ranks):
    routing = Routing()
    exchange = Exchange(None, torch.device("cpu"))
    indices = torch.from_numpy(of_ranks[rank])
    routing.renew(indices, SIZE, K, Settings(), exchange)
    return routing.cuts, routing.owners, routing.split(indices), routing.region_of(rank)


@pytest.mark.parametrize("count", [2, 5])
def test_disjoint_supports_stay_at_home(count):
    of_ranks = supports("disjoint", count)[::-1]
    results = threads.run(renewed, count, of_ranks)
    assert all(result[:2] == results[0][:2] for result in results)
    for rank, (_, owners, split, region) in enumerate(results):
        assert owners[region] == rank
        assert split[region] >= K - K // FINENESS
