"""What is known to go wrong in implementations of the published algorithm, one test each, and does not here."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.cuts import average_cuts
from lightning_plugins.engines.sparse_allreduce.exchange import Exchange
from lightning_plugins.engines.sparse_allreduce.wire import CODES, Wire
from tests.engines.sparse_allreduce import threads

FAR = 1 << 24  # float32 counts no further one by one


def steps(rank, count, vectors, k, settings, step=0):
    """Return update and residual of each vector, one step after the other, each with a residual of its own."""
    state = SparseAllreduceState(**settings)
    state.step = step
    results = []
    for of_ranks in vectors:
        acc = torch.tensor(of_ranks[rank])
        results.append((sparse_allreduce(acc, k, state=state).tolist(), acc.tolist(), state.report))
    return results


def test_what_was_sent_at_an_exact_step_is_taken_out():
    """Where positions are in the order of values and searched as if sorted, nearly nothing is, and goes out twice."""
    generator = np.random.default_rng(0)
    vector = generator.permutation(np.arange(1.0, 201.0)).tolist()
    for update, residual, report in threads.run(steps, 2, [[vector, vector]], 50, {})[0]:
        assert report.exact
        assert np.count_nonzero(update) == 50
        assert np.array_equal(np.array(update) / 2 + residual, vector)
        assert np.count_nonzero(residual) == 150


@pytest.mark.parametrize("code", CODES)
def test_positions_are_whole_numbers(code):
    """Odd ones beyond 2^24, which a float32 cannot hold."""
    positions = torch.tensor([1, FAR + 1, FAR + 3, 2 * FAR + 5])
    header, message = Wire(code, "exact", torch.float32).encode(positions, torch.ones(4), 0, 3 * FAR)
    assert Wire(code, "exact", torch.float32).decode(header, message, 0, 3 * FAR)[0].tolist() == positions.tolist()


def far_away(rank, count):
    acc = torch.zeros(FAR + 64)
    acc[[0, FAR + 1, FAR + 33, FAR + 35]] = 1.0 + rank  # the cut stands before the third, the second is far within its region
    update = sparse_allreduce(acc, 8, state=SparseAllreduceState(indices="int32", cuts="average", owners="rank"))
    return update.nonzero().flatten().tolist(), int(acc.count_nonzero())


def test_a_long_vector_arrives_where_it_was():
    assert threads.run(far_away, 2) == [([0, FAR + 1, FAR + 33, FAR + 35], 0)] * 2


def cut_far_away(rank, count, size):
    indices = torch.arange(size - 10, size)
    return average_cuts(indices, size, Exchange(None, torch.device("cpu")))


def test_sums_of_cuts_do_not_overflow():
    """Four times 1.5 thousand million is more than 32 bits hold, and so is the size of some models itself."""
    for size in (1_500_000_000, 10_000_000_000):
        assert threads.run(cut_far_away, 4, size)[0] == [0, size - 10 + 2, size - 10 + 5, size - 10 + 7, size]


def test_the_threshold_selects_its_own_magnitude():
    """`>` would select k - 1 of k, here and in all, whenever a threshold is used again."""
    vector = [5.0, -4.0, 3.0, 2.0, 1.0, 0.5]
    results = threads.run(steps, 2, [[vector, vector]] * 3, 3, {"threshold": "reused"})[0]
    for update, _, report in results:
        assert (report.selected, report.selected_globally) == (3, 3)
        assert update == [10.0, -8.0, 6.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("cuts", ["average", "histogram"])
def test_a_rank_with_nothing_to_send(cuts):
    """On one rank, on all, and again with thresholds of nothing."""
    nothing, something = [0.0] * 6, [0.0, 2.0, 0.0, -3.0, 0.0, 1.0]
    vectors = [[nothing, nothing], [nothing, something], [something, nothing], [nothing, nothing]]
    for settings in ({"cuts": cuts}, {"cuts": cuts, "repartition_every": 1}, {"cuts": cuts, "threshold_every": 1}):
        results = threads.run(steps, 2, vectors, 3, settings)[0]
        assert [update for update, _, _ in results] == [nothing, something, something, nothing]


def test_what_cancels_stays_on_both_sides():
    """A sum of exactly 0 is not in the result, and both parts wait in the residuals."""
    vectors = [[[7.0, 1.0, 0.0, 2.0], [-7.0, 0.0, 1.0, 2.0]]]
    results = threads.run(steps, 2, vectors, 2, {"threshold": "exact"})
    assert [rank[0][:2] for rank in results] == [
        ([0.0, 0.0, 0.0, 4.0], [7.0, 1.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 4.0], [-7.0, 0.0, 1.0, 0.0]),
    ]


@pytest.mark.parametrize("first", [1, 5, 31, 33])
def test_the_first_sparse_step_may_be_any(first):
    """After dense steps thresholds and cuts are made when they are first needed, whatever the number of the step."""
    vector = [5.0, -4.0, 3.0, 2.0, 1.0, 0.5]
    results = threads.run(steps, 2, [[vector, vector]] * 2, 3, {"threshold": "reused"}, first)[0]
    assert [report.exact for _, _, report in results] == [True, first == 31]
    assert all(report.selected_globally == 3 for _, _, report in results)
