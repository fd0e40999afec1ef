"""Oracles: the published closed forms, protocols played message by message with sets, hand-made cases, scipy's Beta function.

None of them uses cuts, regions, rounds or counts of the code under test.
"""

import math
from bisect import bisect_right
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest

from lightning_plugins.engines.sparse_allreduce import supports as making
from lightning_plugins.engines.sparse_allreduce.simulated_collectives import allgather
from lightning_plugins.engines.sparse_allreduce.simulated_ok_topk import OURS, PAPER, OkTopk, average_cuts, ok_topk, two_level
from lightning_plugins.engines.sparse_allreduce.simulated_schemes import dense_ring, gaussian_k, gtopk, topk_a, topk_dsa
from lightning_plugins.engines.sparse_allreduce.simulator import (
    Link,
    Machine,
    Supports,
    breakdown_s,
    calibrate,
    critical_messages,
    critical_words,
    make_phase,
    step_time_s,
)

WORLD_SIZES = [2, 3, 4, 5, 7, 12, 16, 64, 100, 1024]
HISTOGRAM = OkTopk(cuts="histogram", owners="rank", threshold="histogram")
SCHEMES = {
    "dense": dense_ring,
    "topk_a": topk_a,
    "gaussian_k": lambda supports: gaussian_k(supports, 0.5),
    "gtopk": gtopk,
    "dsa": topk_dsa,
    "doubling": lambda supports: topk_dsa(supports, "doubling"),
    "paper": lambda supports: ok_topk(supports, PAPER),
    "histogram": lambda supports: ok_topk(supports, HISTOGRAM),
    "ours": lambda supports: ok_topk(supports, OURS),
    "two_level": lambda supports: two_level(supports, 4, OURS),
}
KINDS = {
    "random": making.random_supports,
    "one region": making.one_region_supports,
    "disjoint": lambda *given: making.shifted_blocks(*given, shift=0),
    "shifted": making.shifted_blocks,
}


def equal_supports(ranks, each=3):
    """All ranks select the same entries, evenly spread, as many in each rank's even region."""
    k = each * ranks
    indices = np.arange(k, dtype=np.int64) * 10 + 5
    return Supports(10 * k, (indices,) * ranks, indices)


def of(phases, *names):
    return [phase for phase in phases if phase.name in names]


def every(phases, name, column):
    """Per-rank totals of a phase's column."""
    return sum(getattr(phase, column) for phase in phases if phase.name == name)


# --- closed forms ---


@pytest.mark.parametrize("ranks", WORLD_SIZES)
def test_words_and_messages_equal_the_published_forms(ranks):
    supports = equal_supports(ranks, each=3 if ranks <= 100 else 1)
    n, k, part, log = supports.length, supports.final.size, (ranks - 1) / ranks, math.ceil(math.log2(ranks))
    exact = {"rel": 1e-12}
    assert critical_words(dense_ring(supports)) == pytest.approx(2 * n * part, **exact)
    assert critical_words(topk_a(supports)) == pytest.approx(2 * k * (ranks - 1), **exact)
    assert critical_messages(topk_a(supports)) == log
    assert critical_words(gaussian_k(supports, 0.5)) == pytest.approx(k * (ranks - 1), **exact)
    assert critical_words(gtopk(supports)) == pytest.approx(4 * k * log, **exact)
    assert critical_messages(gtopk(supports)) == 2 * log
    assert critical_words(topk_dsa(supports)) == pytest.approx(4 * k * part, **exact)
    assert critical_messages(topk_dsa(supports)) == ranks - 1 + log
    for options in (PAPER, HISTOGRAM, replace(OURS, owners="rank")):
        # With the gathering of the paper every 32nd step has no allgather: its published forms are those of the other steps.
        phases = ok_topk(supports, replace(options, threshold_every=10**15))
        main = of(phases, "split_and_reduce", "balance", "allgather")
        assert critical_words(main) == pytest.approx(4 * k * part, **exact)
        assert critical_messages(main) == pytest.approx(ranks - 1 + log)
        assert critical_messages(of(phases, "counts")) == pytest.approx(ranks - 1 + log)


@pytest.mark.parametrize("ranks", [2, 3, 8, 16, 25])
def test_sparcml_at_its_worst_is_dense(ranks):
    """Every rank selects other entries, together all: the upper end of the published range."""
    length = ranks * ranks * 4
    local = tuple(np.arange(rank, length, ranks) for rank in range(ranks))
    words = critical_words(topk_dsa(Supports(length, local, local[0])))
    assert words == pytest.approx((2 * length / ranks + length) * (ranks - 1) / ranks)


@pytest.mark.parametrize("ranks", [2, 5, 16, 33])
def test_gathering_for_the_threshold_costs_the_published_worst(ranks):
    """Disjoint supports leave P k entries: 2 k P (P - 1) / P words each time."""
    k = 64 * ranks
    local = tuple(np.arange(rank, k * ranks, ranks) for rank in range(ranks))
    phases = of(ok_topk(Supports(k * ranks, local, local[0]), replace(PAPER, threshold_every=1)), "threshold")
    assert critical_words(phases) == pytest.approx(2 * k * (ranks - 1), rel=0.02)
    histogram = of(ok_topk(Supports(k * ranks, local, local[0]), replace(HISTOGRAM, threshold_every=1)), "threshold")
    assert critical_words(histogram) == 4 * 256 * (math.ceil(math.log2(ranks)) + (ranks not in (2, 16)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 7, 16])
def test_histogram_cuts_stay_below_six_k(kind, ranks):
    k = 2000
    supports = KINDS[kind](200_000, k, ranks)
    heaviest_bin = max(np.histogram(np.concatenate(supports.local), bins=4096, range=(0, 200_000))[0])
    for options in (HISTOGRAM, OURS):
        main = of(ok_topk(supports, options), "split_and_reduce", "balance", "allgather")
        assert critical_words(main) <= 6 * k + 4 * heaviest_bin


# --- who sends what, played with sets ---


@pytest.mark.parametrize("ranks", [2, 3, 5, 6, 8, 13])
def test_allgather_delivers_every_block_once(ranks):
    """A rank's rounds together bring it what all others have, and no more."""
    sizes = np.random.default_rng(ranks).integers(0, 50, ranks).astype(float)
    rounds = allgather("x", sizes)
    received = sum(phase.received_words for phase in rounds)
    np.testing.assert_allclose(received, sizes.sum() - sizes)
    assert len(rounds) == math.ceil(math.log2(ranks))


@pytest.mark.parametrize("ranks", [3, 4, 8, 11])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [PAPER, HISTOGRAM, replace(OURS, balance_above=0.0)])
def test_ok_topk_moves_each_entry_to_its_owner_and_into_equal_slices(ranks, kind, options):
    supports = KINDS[kind](40_000, 500, ranks)
    options = replace(options, balance_above=0.0)
    phases = ok_topk(supports, options)
    cuts, owners = played_partition(supports, options)
    sent, received = np.zeros(ranks), np.zeros(ranks)
    for rank, indices in enumerate(supports.local):
        for index in indices:
            owner = owners[bisect_right(cuts, index) - 1]
            if owner != rank:
                sent[rank] += 2
                received[owner] += 2
    np.testing.assert_array_equal(every(phases, "split_and_reduce", "sent_words"), sent)
    np.testing.assert_array_equal(every(phases, "split_and_reduce", "received_words"), received)

    # Entry number e of the concatenation lies in slices of equal, fractional length: who had it, and who gets how much of it.
    slices = Fraction(supports.final.size, ranks)
    gone, got = [Fraction(0)] * ranks, [Fraction(0)] * ranks
    for number, index in enumerate(supports.final):
        region = bisect_right(cuts, index) - 1
        first, last = int(number / slices), int((number + 1) / slices)
        for slot in range(first, min(last, ranks - 1) + 1):
            part = min(number + 1, (slot + 1) * slices) - max(number, slot * slices)
            if slot != region:
                gone[owners[region]] += 2 * part
                got[owners[slot]] += 2 * part
    factor = 31 / 32 if options.threshold == "gather" else 1
    (balance,) = of(phases, "balance")
    assert balance.share == factor
    np.testing.assert_allclose(balance.sent_words, [float(words) for words in gone], atol=1e-6)
    np.testing.assert_allclose(balance.received_words, [float(words) for words in got], atol=1e-6)
    gathered = every(phases, "allgather", "received_words")
    np.testing.assert_allclose(gathered, 2 * supports.final.size * (ranks - 1) / ranks)


def played_partition(supports, options):
    """Cuts and owners from the definitions, an index at a time."""
    ranks, length = supports.ranks, supports.length
    if options.cuts == "average":
        own = [[int(indices[len(indices) * cut // ranks]) for indices in supports.local] for cut in range(1, ranks)]
        inner = [int(Fraction(sum(column), ranks)) for column in own]
    else:
        # Linear inside of the bin that the quantile falls into.
        together = sorted(int(index) for indices in supports.local for index in indices)
        edges = [Fraction(length * edge, 4096) for edge in range(4097)]
        below, place = [0], 0
        for edge in edges[1:]:
            while place < len(together) and together[place] < edge:
                place += 1
            below.append(place)
        inner = []
        for cut in range(1, ranks):
            target = Fraction(len(together) * cut, ranks)
            edge = max(edge for edge in range(4096) if below[edge] <= target and below[edge + 1] > below[edge])
            inside = (target - below[edge]) / (below[edge + 1] - below[edge])
            inner.append(math.ceil(edges[edge] + min(inside, Fraction(1)) * (edges[edge + 1] - edges[edge])))
    cuts = [0, *inner]
    owners = list(range(ranks))
    if options.owners == "local":
        held = [
            [sum(bisect_right(cuts, i) - 1 == region for i in indices) for region in range(ranks)] for indices in supports.local
        ]
        owners = [-1] * ranks
        for _ in range(ranks):
            pairs = [
                (rank, region) for rank in range(ranks) for region in range(ranks) if rank not in owners and owners[region] < 0
            ]
            rank, region = max(pairs, key=lambda pair: (held[pair[0]][pair[1]], -pair[0], -pair[1]))
            owners[region] = rank
    return cuts, owners


@pytest.mark.parametrize("ranks", [2, 3, 6, 8, 9])
def test_doubling_and_tree_equal_played_messages(ranks):
    supports = making.random_supports(600, 40, ranks, seed=ranks)
    np.testing.assert_allclose(words_per_round(topk_dsa(supports, "doubling"), "exchange"), played_doubling(supports))
    np.testing.assert_allclose(words_per_round(gtopk(supports), "tree"), played_tree(supports, 40))


def words_per_round(phases, name):
    return [(phase.sent_words.sum(), phase.received_words.sum(), phase.sent_words.max()) for phase in of(phases, name)]


def summed(messages):
    return (sum(messages), sum(messages), max(messages))


def played_doubling(supports):
    """Recursive doubling on sets; messages are dense from 600 / 2 entries on."""
    have = [set(indices.tolist()) for indices in supports.local]
    ranks, power, rounds = len(have), 2 ** int(math.log2(len(have))), []
    if ranks > power:
        rounds.append(summed([2 * len(have[extra]) for extra in range(power, ranks)]))
        for extra in range(power, ranks):
            have[extra - power] |= have[extra]
    for bit in range(int(math.log2(power))):
        rounds.append(summed([min(2 * len(have[rank]), 600) for rank in range(power)]))
        have = [have[rank] | have[rank ^ (1 << bit)] for rank in range(power)] + have[power:]
    if ranks > power:
        rounds.append(summed([min(2 * len(have[0]), 600)] * (ranks - power)))
    return rounds


def played_tree(supports, k):
    """A binomial tree on sets; what is cut off does not matter to the sizes."""
    have = {rank: set(indices.tolist()) for rank, indices in enumerate(supports.local)}
    rounds = []
    while len(have) > 1:
        order = sorted(have)
        pairs = list(zip(order[::2], order[1::2], strict=False))
        rounds.append(summed([2 * min(k, len(have[sender])) for _, sender in pairs]))
        for receiver, sender in pairs:
            have[receiver] |= have.pop(sender)
    down = 2 * min(k, len(have[0]))
    return rounds + [summed([down] * round(up[0] / down)) for up in reversed(rounds)]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", ["random", "shifted"])
@pytest.mark.parametrize("ranks", [1, 2, 5, 8, 15])
def test_what_is_sent_is_received(name, kind, ranks):
    for phase in SCHEMES[name](KINDS[kind](6_000, 60, ranks)):
        assert phase.sent_words.sum() == pytest.approx(phase.received_words.sum())
        assert min(phase.sent_words.min(), phase.received_words.min(), phase.messages.min()) >= 0
        assert phase.messages.max() > 0 or phase.sent_words.max() == 0
        if ranks == 1 and not phase.inside:
            assert phase.sent_words.max() == 0


def test_a_case_by_hand():
    """Two ranks, eight entries. Averaged cuts: (4 + 5) // 2 = 4, so 0..3 | 4..7."""
    supports = Supports(8, (np.array([0, 1, 4, 6]), np.array([3, 4, 5, 7])), np.array([1, 4, 5, 7]))
    assert average_cuts(supports).tolist() == [0, 4, 8]
    phases = ok_topk(supports, replace(PAPER, balance_above=0.0))
    (split,) = of(phases, "split_and_reduce")
    assert (split.sent_words.tolist(), split.received_words.tolist()) == ([4, 2], [2, 4])
    (balance,) = of(phases, "balance")  # rank 0 has {1}, rank 1 {4, 5, 7}: one entry moves to rank 0
    assert (balance.sent_words.tolist(), balance.received_words.tolist()) == ([0, 2], [2, 0])
    assert of(ok_topk(supports, PAPER), "balance") == []  # 3 is below four times the mean of 2
    (gather,) = of(ok_topk(supports, PAPER), "allgather")
    assert (gather.sent_words.tolist(), gather.received_words.tolist()) == ([2, 6], [6, 2])
    # Reduced are {0, 1, 3} and {4, 5, 6, 7}: six and eight words.
    first, _ = of(ok_topk(supports, PAPER), "threshold")
    assert (first.sent_words.tolist(), first.received_words.tolist(), first.share) == ([6, 8], [8, 6], 1 / 32)


# --- adversaries ---


def test_shifted_blocks_overload_averaged_cuts_alone():
    """16 ranks select 10,000 of a million entries each: half of all entries reach one rank, against a bound of 2k words."""
    k, ranks = 10_000, 16
    supports = making.shifted_blocks(1_000_000, k, ranks)
    assert not any(set(a.tolist()) & set(b.tolist()) for a, b in combinations(supports.local, 2))
    heaviest_bin = max(np.histogram(np.concatenate(supports.local), bins=4096, range=(0, 1_000_000))[0])
    received = {
        cuts: every(ok_topk(supports, replace(HISTOGRAM, cuts=cuts)), "split_and_reduce", "received_words")
        for cuts in ("average", "histogram")
    }
    assert received["histogram"].max() <= 2 * k + 2 * heaviest_bin
    assert received["average"].max() > 7 * 2 * k
    assert np.sort(received["average"])[:-2].max() < 0.1 * 2 * k
    assert every(ok_topk(supports, OURS), "split_and_reduce", "received_words").max() <= 2 * heaviest_bin  # owners move with it


def test_one_region_overloads_even_splits_alone():
    supports = making.one_region_supports(160_000, 1_000, 8)
    assert max(indices[-1] for indices in supports.local) < 160_000 / 32
    even = every(topk_dsa(supports), "split_and_reduce", "received_words")
    assert even[0] == 7 * 2 * 1_000
    assert every(ok_topk(supports, HISTOGRAM), "split_and_reduce", "received_words").max() < 1.1 * 2 * 1_000


# --- time ---


def test_time_of_phases_by_hand():
    """Two phases; the second in every fourth step and inside a node."""
    phases = [
        make_phase("a", 2, np.array([1, 3]), np.array([100, 10]), np.array([10, 100]), elements=np.array([5, 7])),
        make_phase("b", 2, 2, 40, selected=11, share=0.25, inside=True),
    ]
    machine = Machine(Link(2.0, 0.5), gamma_s_per_element=0.1, topk_s_per_element=3.0, inside=Link(1.0, 0.25))
    first, second = (3 * 2 + 50) + 0.7, 0.25 * (2 * 1 + 10 + 33)
    assert step_time_s(phases, machine) == pytest.approx(first + second)
    assert breakdown_s([*phases, phases[0]], machine) == pytest.approx({"a": 2 * first, "b": second})
    assert step_time_s(phases, replace(machine, inside=None)) == pytest.approx(first + 0.25 * (2 * 2 + 20 + 33))
    assert (critical_words(phases), critical_messages(phases)) == (100, 3)
    assert (critical_words(phases, inside=True), critical_messages(phases, inside=True)) == (10, 0.5)


@pytest.mark.parametrize("name", SCHEMES)
def test_slower_machines_and_denser_supports_never_take_less_time(name):
    few, many = (making.random_supports(20_000, k, 8) for k in (200, 800))
    machine = Machine(Link(1e-5, 1e-9), 1e-10, 1e-9, Link(1e-6, 1e-10))
    base = step_time_s(SCHEMES[name](few), machine)
    slower = [
        replace(machine, between=Link(2e-5, 1e-9)),
        replace(machine, between=Link(1e-5, 2e-9)),
        replace(machine, gamma_s_per_element=2e-10),
        replace(machine, topk_s_per_element=2e-9),
    ]
    times = [step_time_s(SCHEMES[name](few), each) for each in slower]
    assert min(times) >= base
    assert min(times[:3]) > base
    assert step_time_s(SCHEMES[name](many), machine) >= base


def test_rarer_upkeep_costs_its_share():
    supports = making.random_supports(20_000, 200, 8)
    words = {
        every_: critical_words(
            of(ok_topk(supports, replace(OURS, threshold_every=every_, repartition_every=every_)), "threshold", "cuts")
        )
        for every_ in (1, 50)
    }
    assert words[1] == pytest.approx(50 * words[50])
    assert words[1] == 3 * 4096 + 8 * 7 + 3 * 4 * 256


@pytest.mark.parametrize("options", [PAPER, HISTOGRAM])
def test_two_levels(options):
    nodes = making.random_supports(20_000, 200, 6)
    assert critical_words(two_level(nodes, 1, options)) == critical_words(ok_topk(nodes, options))
    phases = two_level(nodes, 4, options)
    assert critical_words(phases) == critical_words(ok_topk(nodes, options))
    assert critical_words(phases, inside=True) == 2 * 20_000 * 3 / 4
    work = Machine(Link(0, 0), 1.0, 1.0)
    alone, within = step_time_s(ok_topk(nodes, options), work), 3 * 20_000 * 3 / 4
    assert step_time_s(phases, work) == pytest.approx(alone / 4 + within)


def test_a_sample_stands_for_the_whole():
    """Words of entries grow with the scale; messages, histograms, cuts and counts do not."""
    small = making.random_supports(20_000, 200, 6)
    large = replace(small, scale=7.0)
    for name, scheme in SCHEMES.items():
        for phase, scaled in zip(scheme(small), scheme(large), strict=True):
            fixed = phase.name in ("cuts", "counts") or (phase.name == "threshold" and name != "paper")
            np.testing.assert_allclose(scaled.sent_words, (1 if fixed else 7) * phase.sent_words)
            np.testing.assert_array_equal(scaled.messages, phase.messages)


# --- calibration ---


def ring_s(ranks, size_bytes, alpha_s, beta_s_per_word):
    """A ring played step by step: everyone passes a chunk on, first summing, then collecting."""
    return sum(alpha_s + beta_s_per_word * size_bytes / 4 / ranks for _ in ("sum", "collect") for _ in range(ranks - 1))


def measured(noise=0.0, alpha_s=60e-6, beta_s_per_word=3e-7, world_sizes=(2, 3, 4, 8)):
    generator = np.random.default_rng(0)
    rows = [(p, size) for p in world_sizes for size in (4_096, 65_536, 1_048_576, 16_777_216)]
    seconds = [ring_s(p, size, alpha_s, beta_s_per_word) * (1 + noise * generator.normal()) for p, size in rows]
    return *(np.array(column) for column in zip(*rows, strict=True)), np.array(seconds)


def test_calibration_finds_the_link_and_predicts_the_world_size_it_has_not_seen():
    exact = calibrate(*measured())
    assert exact.link == pytest.approx((60e-6, 3e-7))
    assert exact.held_out == 8
    np.testing.assert_allclose(exact.errors, 0, atol=1e-9)
    noisy = calibrate(*measured(noise=0.05))
    assert noisy.link == pytest.approx((60e-6, 3e-7), rel=0.1)
    assert np.abs(noisy.errors).max() < 0.2
    assert calibrate(*measured(), held_out=3).measured_s == pytest.approx(
        [ring_s(3, b, 60e-6, 3e-7) for b in (2**12, 2**16, 2**20, 2**24)]
    )


def test_a_negative_cost_is_none():
    """Small all-reduces that take no time of their own, and less than the large ones promise."""
    world_size, sizes, seconds = measured(alpha_s=0)
    seconds = np.where(sizes < 10_000, 0.8 * seconds, seconds)
    link = calibrate(world_size, sizes, seconds).link
    assert link.alpha_s == 0
    assert link.beta_s_per_word == pytest.approx(3e-7, rel=0.15)


# --- recorded and extrapolated supports ---


@pytest.fixture(scope="module")
def recorded():
    return making.record_supports(16, 20, 0.02, every=10)


def test_recorded_supports_are_those_of_a_training(recorded):
    first, last = recorded
    k = round(0.02 * last.length)
    assert {indices.size for indices in last.local} == {k}
    assert last.final.size == k
    assert {*last.final.tolist()} <= set().union(*(indices.tolist() for indices in last.local))
    chance = 0.02 * k
    shared = np.mean([len({*a.tolist()} & {*b.tolist()}) for a, b in combinations(last.local, 2)])
    assert 2 * chance < shared < 0.5 * k
    assert not np.array_equal(first.final, last.final)
    once, again = (making.record_supports(2, 2, 0.02)[-1] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(once.local, again.local, strict=True))


def test_what_was_sent_and_used_leaves_the_residual():
    """Used entries start from 0 again and are seldom selected next; what was selected in vain stays and is selected again."""
    recorded = making.record_supports(4, 8, 0.01, every=1)
    again = {"used": [], "in vain": []}
    for before, after in pairwise(recorded):
        for old, new in zip(before.local, after.local, strict=True):
            for name, indices in (("used", {*old} & {*before.final}), ("in vain", {*old} - {*before.final})):
                again[name].append(len(indices & {*new}) / max(1, len(indices)))
    assert np.mean(again["in vain"]) > 0.4
    assert np.mean(again["used"]) < 0.2


def test_a_union_is_predicted_from_fewer_ranks(recorded):
    """Fitted to 8 of 16 ranks; the union of 16 counted by hand."""
    union = len(set().union(*(indices.tolist() for indices in recorded[-1].local))) / recorded[-1].length
    predicted = making.expected_union(making.measure_overlap(recorded[-1].first(8)), 16)
    assert predicted == pytest.approx(union, rel=0.1)
    independent = 1 - 0.98**16
    assert abs(predicted - union) < 0.5 * abs(independent - union)


def test_drawn_supports_look_like_recorded_ones(recorded):
    last = recorded[-1]
    drawn = making.draw_supports(making.measure_overlap(last), last.length, 16)

    def looks(supports):
        multiplicity = np.zeros(supports.length)
        for indices in supports.local:
            multiplicity[indices] += 1
        halves = [(indices < supports.length / 8).mean() for indices in supports.local]
        shared = np.mean([len({*a.tolist()} & {*b.tolist()}) for a, b in combinations(supports.local, 2)])
        return [shared, (multiplicity > 0).sum(), multiplicity[supports.final].mean(), np.mean(halves)]

    np.testing.assert_allclose(looks(drawn), looks(last), rtol=0.15)
    # Averaged cuts are worse for recorded supports, where each rank has a profile of its own: the draws are kind to them.
    for name, tolerance in {"dsa": 0.08, "histogram": 0.05, "ours": 0.05, "paper": 0.25}.items():
        assert critical_words(SCHEMES[name](drawn)) == pytest.approx(critical_words(SCHEMES[name](last)), rel=tolerance)


def test_expected_union_equals_beta_functions():
    special = pytest.importorskip("scipy.special")
    overlap = making.Overlap(np.array([0.5, 1.5, 1.0, 1.0]), 12.0, 0.02)
    a, b = 12 * 0.02 * overlap.profile, 12 * (1 - 0.02 * overlap.profile)
    none = np.exp(special.betaln(a, b + 50) - special.betaln(a, b))
    assert making.expected_union(overlap, 50) == pytest.approx(1 - none.mean())


def test_draws_have_what_they_were_asked_for():
    overlap = making.Overlap(np.array([0.4, 1.6]), 10.0, 0.02)
    drawn = making.draw_supports(overlap, 100_000, 24)
    assert {indices.size for indices in drawn.local} == {2_000}
    assert np.mean([(indices < 50_000).mean() for indices in drawn.local]) == pytest.approx(0.2, abs=0.03)
    union = len(set().union(*(indices.tolist() for indices in drawn.local)))
    assert union == pytest.approx(100_000 * making.expected_union(overlap, 24), rel=0.03)
    again = making.measure_overlap(drawn, bins=2)
    assert again.concentration == pytest.approx(10, rel=0.1)
    np.testing.assert_allclose(again.profile, overlap.profile, rtol=0.1)
    fewer = making.draw_supports(overlap, 100_000, 3)
    assert all(np.array_equal(a, b) for a, b in zip(fewer.local, drawn.local, strict=False))


def test_a_quarter_of_the_sample_gives_the_same_words():
    overlap = making.Overlap(np.array([0.4, 1.6]), 10.0, 0.01)
    for name in ("dsa", "gtopk", "ours"):
        small, large = (
            SCHEMES[name](making.draw_supports(overlap, length, 16, scale=1e7 / length)) for length in (1 << 16, 1 << 18)
        )
        assert critical_words(small) == pytest.approx(critical_words(large), rel=0.05)


# --- refusals ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Supports(5, (), np.array([0])), "at least one rank, got none"),
        (lambda: Supports(5, (np.array([2, 1]),), np.array([1])), r"rank 0 must be sorted, distinct and in \[0, 5\)"),
        (lambda: Supports(5, (np.array([1, 2]),), np.array([5])), r"final must be sorted, distinct and in \[0, 5\)"),
        (lambda: Machine(Link(1e-6, -1.0)), "costs must be 0 or more seconds"),
        (lambda: OkTopk(cuts="averaged"), "cuts must be one of average, histogram, got averaged"),
        (lambda: OkTopk(bins=0), "must be 1 or more"),
        (lambda: gaussian_k(equal_supports(2), 0.0), r"selected_share must be positive, got 0\.0"),
        (lambda: two_level(equal_supports(2), 0), "node_size must be 1 or more, got 0"),
        (lambda: calibrate(*measured(world_sizes=(8,))), r"need rows of world size 8 to predict .* got world sizes \[8\]"),
        (
            lambda: calibrate(np.array([2, 2, 3]), np.array([4, 8, 8]), np.array([1.0, 0.0, 1.0])),
            "seconds must be positive, got 0",
        ),
        (lambda: making.record_supports(2, 1, 0.0), r"density must be in \(0, 1\]"),
        (lambda: making.measure_overlap(equal_supports(1)), "two ranks or more, got one"),
        (lambda: making.measure_overlap(making.shifted_blocks(1_000, 10, 5)), "no overlap to fit"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
