"""Each baseline against its sum written out in numpy, for any number of ranks; mass, bytes, and what they are worse at."""

import zlib

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.rivals import ALGORITHMS, fitted_threshold
from tests.engines.sparse_allreduce import threads
from tests.engines.sparse_allreduce.cases import Case, gradient
from tests.engines.sparse_allreduce.oracle import largest

KINDS = ("random", "heavy", "ties", "cancel", "zeros", "single", "disjoint", "denormal")


def one_call(rank, count, name, cases):
    results = []
    for case in cases:
        acc = torch.from_numpy(gradient(case, rank, count, 0))
        state = SparseAllreduceState()
        update = ALGORITHMS[name](acc.view(-1, 1), case.k, state=state).flatten()
        results.append((update.numpy(), acc.numpy(), state.traffic.total_bytes(), zlib.crc32(update.numpy().tobytes())))
    return results


def calls_of_all(rank, count, names, cases):
    return [one_call(rank, count, name, cases) for name in names]


def ranks_first(results):
    """Turn results of ranks by name into results of names by rank."""
    return zip(*results, strict=True)


def selected(name, acc, k):
    """Return what a rank selects, by sorting."""
    if name == "dense":
        return np.arange(len(acc))
    if name == "gaussian_k":
        return np.flatnonzero((np.abs(acc) >= acc.dtype.type(fitted_threshold(torch.from_numpy(acc), k))) & (acc != 0))
    return largest(acc, k)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["dense", "topk_a", "topk_dsa", "gaussian_k"])
def test_the_sum_of_what_each_selects(name, count):
    whole = name == "dense"  # a process group adds in an order of its own
    cases = [Case(kind, 300, 24, integers=whole and kind != "denormal") for kind in KINDS]
    cases += [Case("random", 300, 200, integers=whole), Case("random", 7, 2, integers=whole), Case("ties", 40, 60)]
    cases.append(Case("heavy", 300, 24, dtype="float64", integers=whole))
    results = threads.run(one_call, count, name, cases)
    for number, case in enumerate(cases):
        per_rank = [of_rank[number] for of_rank in results]
        accs = [gradient(case, rank, count, 0) for rank in range(count)]
        total = np.zeros(case.size, case.dtype)
        for acc, (_, residual, _, _) in zip(accs, per_rank, strict=True):
            chosen = selected(name, acc, case.k)
            total[chosen] += acc[chosen]
            acc[chosen] = 0
            assert np.array_equal(residual, acc), (name, case)
        assert np.array_equal(per_rank[0][0], total), (name, case)
        assert len({crc for _, _, _, crc in per_rank}) == 1


def tree(parts, k):
    """Return the sums of a binomial tree that keeps k at each node, and what each node dropped, as dense vectors."""
    if len(parts) == 1:
        return parts[0], [np.zeros_like(parts[0])]
    half = 1 << ((len(parts) - 1).bit_length() - 1)
    (left, left_dropped), (right, right_dropped) = tree(parts[:half], k), tree(parts[half:], k)
    total = left + right
    kept = np.zeros_like(total)
    chosen = largest(total, k)
    kept[chosen] = total[chosen]
    left_dropped[0] = left_dropped[0] + (total - kept)
    return kept, left_dropped + right_dropped


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8, 12])
def test_gtopk_is_a_tree_and_its_losses_come_back(count):
    cases = [Case(kind, 200, 20, integers=kind != "denormal") for kind in KINDS]
    results = threads.run(one_call, count, "gtopk", cases)
    lost = 0
    for number, case in enumerate(cases):
        accs = [gradient(case, rank, count, 0) for rank in range(count)]
        parts = []
        for acc in accs:
            parts.append(np.zeros_like(acc))
            parts[-1][largest(acc, case.k)] = acc[largest(acc, case.k)]
        expected, dropped = tree(parts, case.k)
        final = expected != 0
        for rank, (update, residual, _, _) in enumerate(of_rank[number] for of_rank in results):
            assert np.array_equal(update, expected), case
            assert np.array_equal(
                residual, np.where(final & (parts[rank] != 0), 0, accs[rank]) + np.where(final, dropped[rank], 0)
            )
        residuals = sum(of_rank[number][1].astype(np.float64) for of_rank in results)
        assert np.array_equal(residuals + expected, sum(acc.astype(np.float64) for acc in accs)), case
        lost += sum(np.count_nonzero(of_node[final]) for of_node in dropped)
    assert count < 3 or lost > 0  # else the cases show nothing of the tree's losses


def test_bytes_are_those_of_the_formulas():
    """In words, beside the counts that go ahead: of disjoint supports, whose sums do not fall together."""
    size, k = 40_000, 800
    for count in (2, 4, 8):
        dense_pieces = min(2 * k, size // count)
        expected = {
            "dense": 2 * size * (count - 1) / count,
            "topk_a": 2 * k * (count - 1),
            "topk_dsa": 2 * k + dense_pieces * (count - 1),
            "gtopk": 2 * k * np.log2(count),  # and as many received
        }
        case = Case("shifted", size, k)
        for name, words in expected.items():
            results = threads.run(one_call, count, name, [case])
            most = max(max(of_rank[0][2]) for of_rank in results) / 4
            assert most == pytest.approx(words, abs=6 * count), (name, count)


def test_sums_travel_dense_where_that_is_shorter():
    """Eight random supports of a tenth each fill half of the vector; of a half each, even what is sent first is dense."""
    size, count = 8000, 8
    for k, first in ((800, 2 * 800), (6000, size)):
        results = threads.run(one_call, count, "topk_dsa", [Case("random", size, k)])
        words = (first + size) * (count - 1) / count
        assert max(max(of_rank[0][2]) for of_rank in results) / 4 == pytest.approx(words, rel=0.03)


def test_the_fitted_threshold():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert int((normal.abs() >= fitted_threshold(normal, 2000)).sum()) == pytest.approx(2000, rel=0.1)
    normal[::20_000] = 1e4
    assert int((normal.abs() >= fitted_threshold(normal, 2000)).sum()) == 10  # four halvings do not make up for ten outliers


@pytest.mark.parametrize("count", [2, 5])
def test_over_a_process_group(ranks, count):
    """What the threads show holds with gloo."""
    cases = [Case(kind, 300, 24, integers=True) for kind in ("heavy", "ties")]
    names = list(ALGORITHMS)[1:]
    for name, results in zip(names, ranks_first(ranks.run(calls_of_all, count, names, cases)), strict=True):
        for mine, theirs in zip(results, threads.run(one_call, count, name, cases), strict=True):
            for (update, residual, moved, _), (same, rest, also, _) in zip(mine, theirs, strict=True):
                assert np.array_equal(update, same)
                assert np.array_equal(residual, rest)
                assert moved == also


def test_without_a_group_and_without_a_state():
    for name, algorithm in ALGORITHMS.items():
        acc = torch.tensor([3.0, -1.0, 0.5, -4.0])
        update = algorithm(acc, 2)
        assert torch.equal(update + acc, torch.tensor([3.0, -1.0, 0.5, -4.0])), name
        assert float(update[3]) == -4.0


def test_ours_stands_first():
    assert next(iter(ALGORITHMS.items())) == ("ok_topk", sparse_allreduce)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_bad_arguments_are_refused(name):
    for acc, k, message in (
        (torch.ones(4).half(), 2, "float32 or float64"),
        (torch.ones(4, 4).t()[:2], 2, "contiguous"),
        (torch.ones(4).to_sparse(), 2, r"\.to_dense\(\)"),
        (torch.ones(4), 0, "got 0"),
        (torch.ones(0), 1, "leave empty tensors out"),
    ):
        with pytest.raises(InputError, match=message):
            ALGORITHMS[name](acc, k)
