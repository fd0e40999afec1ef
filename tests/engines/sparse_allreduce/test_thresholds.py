"""A threshold that is followed from step to step: near its aim while gradients change, and never above the budget."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.threshold import AIM, FASTEST, LEARNING, PROBE, SURPRISE, Threshold
from tests.engines.sparse_allreduce import threads

SIZE, K, STEPS = 20_000, 200, 80


def follow(rank, count, settings, growth, tail):
    """Return what was selected, here and in all, over k, at each step of gradients that grow or shrink."""
    state = SparseAllreduceState(**settings)
    generator = np.random.default_rng(rank)
    acc = torch.zeros(SIZE)
    shares = []
    for step in range(STEPS):
        gradient = generator.standard_normal(SIZE) if tail == "normal" else generator.standard_t(3, SIZE)
        acc += torch.from_numpy((gradient * growth**step).astype(np.float32))
        update = sparse_allreduce(acc, K, state=state)
        report = state.report
        assert report.selected <= K
        assert report.selected_globally == int(update.count_nonzero()) <= K
        assert report.most_selected <= K
        assert report.candidates >= report.selected
        shares.append((report.selected / K, report.selected_globally / K))
    return np.array(shares)


@pytest.mark.parametrize("tail", ["normal", "heavy"])
@pytest.mark.parametrize("growth", [0.98, 1.0, 1.02])
def test_the_servo_stays_in_its_band(growth, tail):
    """One exact step at the start, then 79 by the servo, while gradients become five times as large or small, or stay."""
    for shares in threads.run(follow, 2, {"threshold": "servo", "threshold_every": 10_000}, growth, tail):
        assert shares[5:].min() > 0.4
        assert shares[5:].mean() > 0.85


def test_a_reused_threshold_does_not():
    """Which shows that the band above asks for something: everything that error feedback piles up comes to be above it."""
    candidates = threads.run(count_candidates, 2, "reused")[0]
    assert candidates[-1] > 20 * K
    assert threads.run(count_candidates, 2, "servo")[0][-1] < 4 * K


def test_a_threshold_of_zero_is_left():
    """Fewer sums than k that are not zero, as where all layers but a last one of zeros have no gradient yet, then all of them."""
    for exact, selected in threads.run(first_few_then_all, 2):
        assert exact == [True, False, True, False, False]
        assert selected[2] == K
        assert max(selected[3:]) < 4 * K


def first_few_then_all(rank, count):
    state = SparseAllreduceState(threshold="servo")
    exact, selected = [], []
    acc = torch.zeros(SIZE)
    for step in range(5):
        generator = torch.Generator().manual_seed(step * count + rank)
        acc[: K // 4 if step == 0 else SIZE] += torch.randn(K // 4 if step == 0 else SIZE, generator=generator)
        sparse_allreduce(acc, K, state=state)
        exact.append(state.report.exact)
        selected.append(state.report.candidates_globally)
    return exact, selected


def count_candidates(rank, count, threshold):
    state = SparseAllreduceState(threshold=threshold, threshold_every=10_000)
    acc = torch.zeros(SIZE)
    found = []
    for step in range(STEPS):
        acc += torch.randn(SIZE, generator=torch.Generator().manual_seed(step * count + rank))
        sparse_allreduce(acc, K, state=state)
        found.append(state.report.candidates)
    return found


@pytest.mark.parametrize("settings", [{"threshold": "sampled"}, {"threshold": "exact"}, {"threshold_every": 7}])
def test_the_others_keep_the_budget_too(settings):
    for shares in threads.run(follow, 2, settings, 0.98, "normal"):
        assert shares[:, 0].min() > 0.5
        assert shares.max() <= 1.0


def test_exact_steps_come_when_they_are_due():
    state = SparseAllreduceState(threshold_every=4)
    exact = []
    for _ in range(10):
        sparse_allreduce(torch.randn(50), 5, state=state)
        exact.append(state.report.exact)
    assert exact == [step % 4 == 0 for step in range(10)]


@pytest.mark.parametrize("index", [2.5, 10.0, 40.0])
@pytest.mark.parametrize("growth", [0.97, 1.0, 1.03])
def test_a_power_law_that_moves_is_followed(index, growth):
    """Of N entries N * (scale / t)^index reach t. The servo learns index and growth, and then meets its aim at every step."""
    budget, scale, threshold = 1000, 7.0, Threshold(2.0 * 7.0 * 100 ** (1 / index))
    counts = []
    for _ in range(120):
        counts.append(round(100_000 * min(1.0, (scale / threshold.value) ** index)))
        threshold.follow(counts[-1], round(counts[-1] * PROBE**-index), budget)
        scale *= growth
    assert counts[60:] == [pytest.approx(AIM * budget, rel=0.04)] * 60
    assert threshold.tail == pytest.approx(1 / index, rel=0.04)
    assert threshold.drift == pytest.approx(math.log(growth), abs=1e-3)


def test_a_step_moves_no_faster_than_twice():
    """A single strange batch moves a threshold by 2 at most, and what it leaves as drift by a fortieth or less."""
    large, learnt = 10**9, math.exp(LEARNING * SURPRISE)
    for count, factor in ((0, 1 / FASTEST / learnt), (1, 1 / FASTEST / learnt), (large, FASTEST * learnt), (92, 1.0)):
        threshold = Threshold(3.0, tail=0.5)
        threshold.follow(count, count, large if count < 92 else 100)
        assert threshold.value == pytest.approx(3.0 * factor, rel=1e-12)
    for threshold, budget in ((Threshold(None), 10), (Threshold(2.0), 0)):
        before = threshold.value
        threshold.follow(5, 5, budget)
        assert threshold.value == before


def test_a_share_of_k_is_seldom_passed():
    """Where the budget is passed, sums have to be sorted over all ranks: rounds of messages that a good servo spares."""
    for candidates in threads.run(count_candidates, 2, "servo"):
        assert np.mean(np.array(candidates[1:]) > K) < 0.35
        assert np.mean(candidates[20:]) == pytest.approx(AIM * K, rel=0.1)


def resumed(rank, count, at):
    """Run twelve steps, then go on once more from the state after ``at``; return what has to be alike."""
    state, generator = SparseAllreduceState(threshold_every=8, repartition_every=5), np.random.default_rng(rank)
    # They fall so fast that most steps stay below the budget: what is trimmed to k would not show its threshold.
    gradients = [torch.from_numpy((generator.standard_t(3, 500) * 0.6**step).astype(np.float32)) for step in range(12)]
    acc, updates, saved = torch.zeros(500), [], None
    for step, gradient in enumerate(gradients):
        if step == at:
            saved = (acc.clone(), state.state_dict())
        acc += gradient
        updates.append(sparse_allreduce(acc, 20, state=state))
    acc, again = saved[0], SparseAllreduceState(threshold_every=8, repartition_every=5)
    again.load_state_dict(saved[1])
    for gradient, update in zip(gradients[at:], updates[at:], strict=True):
        acc += gradient
        assert torch.equal(sparse_allreduce(acc, 20, state=again), update)
    return state.state_dict(), again.state_dict()


@pytest.mark.parametrize("at", [1, 5, 8, 11])
def test_a_saved_state_goes_on_with_the_same_bits(at):
    """Updates, thresholds, cuts and their age."""
    for first, second in threads.run(resumed, 3, at):
        assert first == second
        assert first["step"] == 12
