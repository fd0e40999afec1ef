"""The k-th largest of what lies on several ranks, found by histograms of bits, against a sort."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.global_threshold import choose, kth_largest
from tests.engines.sparse_allreduce import threads
from tests.engines.sparse_allreduce.oracle import largest

KINDS = ("normal", "ties", "denormal", "powers", "mostly_zero", "one_rank", "empty")


def part(kind, rank, dtype):
    """Return the entries of a rank, not as many on each."""
    generator = np.random.default_rng([KINDS.index(kind), rank])
    size = 40 + 17 * rank
    if kind == "ties":
        values = generator.integers(-3, 4, size)
    elif kind == "denormal":
        values = generator.integers(-9, 10, size) * float(np.finfo(dtype).smallest_subnormal)
    elif kind == "powers":  # every digit of the exponent
        values = 10.0 ** generator.uniform(-37, 37, size)
    elif kind == "mostly_zero":
        values = generator.standard_normal(size) * (generator.random(size) < 0.1)
    elif kind == "one_rank":
        values = generator.standard_normal(size if rank == 1 else 0)
    elif kind == "empty":
        values = np.empty(0)
    else:
        values = generator.standard_normal(size)
    return values.astype(dtype)


def find(rank, count, dtype, ks):
    exchange = Exchange(None, torch.device("cpu"))
    found = []
    for kind in KINDS:
        magnitudes = torch.from_numpy(part(kind, rank, dtype)).abs()
        found.append([kth_largest(magnitudes, k, exchange, 1 << 31 if k % 2 else 1 << 20) for k in ks])
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_the_sorted_one(count, dtype):
    ks = (1, 2, 5, 33, 57, 100, 1000)
    results = threads.run(find, count, dtype, ks)
    assert all(result == results[0] for result in results)
    for kind, found in zip(KINDS, results[0], strict=True):
        magnitudes = np.sort(np.abs(np.concatenate([part(kind, rank, dtype) for rank in range(count)])))[::-1]
        for k, threshold in zip(ks, found, strict=True):
            assert threshold == (magnitudes[k - 1] if k <= len(magnitudes) else 0.0), (kind, k)


def chosen(rank, count, threshold, budgets, order):
    exchange = Exchange(None, torch.device("cpu"))
    rows = []
    for kind in KINDS:
        for budget in budgets:
            choice = choose(torch.from_numpy(part(kind, rank, np.float32)), threshold, budget, order, exchange, most=1 << 20)
            rows.append((choice.kept.numpy(), choice.counts, choice.threshold, choice.candidates))
    return rows


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 2.0])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_the_budget_is_kept_and_ties_go_in_order(threshold, order):
    """The chosen ones are those of a sort over the ranks laid end to end in the given order."""
    budgets = (3, 30, 90, 500)
    results = threads.run(chosen, 3, threshold, budgets, order)
    cases = [(kind, budget) for kind in KINDS for budget in budgets]
    for number, (kind, budget) in enumerate(cases):
        values = np.concatenate([part(kind, rank, np.float32) for rank in order])
        reaching = np.abs(values) >= (0.0 if threshold is None else threshold)
        expected = np.zeros(len(values), bool)
        expected[largest(np.where(reaching, values, 0), budget)] = True
        assert np.array_equal(np.concatenate([results[rank][number][0] for rank in order]), expected), (kind, budget)
        for rank in range(3):
            kept, counts, _, candidates = results[rank][number]
            assert counts == results[0][number][1]
            assert counts[rank] == kept.sum()
            assert candidates == (counts_of(expected) if threshold is None else counts_of(reaching & (values != 0)))


def counts_of(mask):
    return int(mask.sum())
