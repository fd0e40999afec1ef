"""What a rank sends and receives: by the collectives' own count for any support, and by the counters of network interfaces.

In entries, of two words each with int32 and exact values: split-and-reduce sends at most k and brings at most a region, which is
k and the granularity of the cuts; dealing out sends at most k; the allgather moves k (P - 1) / P, or an eighth more where the
slices are not dealt out. That is 6 k words in all. What is small beside it (cuts, counts, thresholds) is bounded by itself.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from tests.engines.sparse_allreduce import threads
from tests.engines.sparse_allreduce.cases import PHASES, Case, measure

K, SIZE = 2000, 200_000
SUPPORTS = ("random", "one_region", "disjoint", "drifting", "shifted", "moved", "lopsided", "gathering")
WORST_PADDING = 2 * 8 / 4  # words a message: up to 7 bytes at the end of two


def measured(count, kind, steps=1, k=K, **settings):
    """Return, for each step, what each rank moved."""
    case = Case(kind, SIZE, k, steps, settings={"indices": "int32", "values": "exact", **settings})
    return list(zip(*threads.run(measure, count, case), strict=True))


def has_owners(moved):
    """Whether regions can be given to ranks so that each holds the mean share of its own."""
    counts = np.array([of_rank.counts for of_rank in moved])
    enough = counts >= counts.sum() // len(counts) ** 2
    return enough[linear_sum_assignment(enough, maximize=True)].all()


@pytest.mark.parametrize(("count", "threshold", "steps"), [(2, "reused", 3), (3, "servo", 3), (5, "reused", 3), (5, "servo", 8)])
@pytest.mark.parametrize("kind", SUPPORTS)
def test_no_support_moves_more_than_six_words_an_entry(kind, count, threshold, steps):
    """With every rank's region its own, and with those it holds most of; at steps that compute thresholds and at others."""
    for owners in ("rank", "local"):
        for moved in measured(count, kind, steps, threshold=threshold, owners=owners):
            for of_rank in moved:
                assert of_rank.most_selected <= K
                slack = 2 * of_rank.granularity + count * WORST_PADDING
                assert of_rank.granularity <= max(count, K // 100)
                assert of_rank.words("sent") <= 6 * K + slack
                assert of_rank.words("received") <= 6 * K + slack
                assert of_rank.sent["split_and_reduce"] / 4 <= 2 * K + slack
                assert of_rank.received["split_and_reduce"] / 4 <= 2 * K + slack


@pytest.mark.parametrize("count", [2, 4, 7])
@pytest.mark.parametrize("kind", SUPPORTS)
def test_local_owners_move_less_where_there_are_such(kind, count):
    """Whoever owns a region of which it holds the mean share sends and gets (P - 1) / P of all bounds."""
    for moved in measured(count, kind, 1):
        assert has_owners(moved)
        for of_rank in moved:
            slack = 2 * of_rank.granularity + count * WORST_PADDING
            for way in ("sent", "received"):
                assert of_rank.words(way) <= 6 * K * (count - 1) / count + slack
                assert getattr(of_rank, way)["split_and_reduce"] / 4 <= 2 * K * (count - 1) / count + slack


def test_such_owners_do_not_always_exist():
    """Two regions of which the same single rank holds a third: one of them goes to a rank that holds less, and receives more."""
    moved = measured(3, "no_owners")[0]
    assert not has_owners(moved)
    most = max(of_rank.received["split_and_reduce"] for of_rank in moved) / 4
    assert 1.03 * 2 * K * 2 / 3 < most <= 2 * K
    assert all(max(of_rank.words("sent"), of_rank.words("received")) < 6 * K * 2 / 3 for of_rank in moved)


def test_the_published_scheme_breaks_the_bound_by_a_third():
    """Each of two ranks has selected in the other's region, and the final set lies in one: 2 k, k and k words of 3 k."""
    paper = measured(2, "lopsided", cuts="average", owners="rank")[0]
    bound = 6 * K * (2 - 1) / 2
    assert max(of_rank.words("sent") for of_rank in paper) == pytest.approx(4 / 3 * bound, rel=0.01)
    ours = measured(2, "lopsided")[0]
    assert max(of_rank.words("sent") for of_rank in ours) == pytest.approx(2 / 3 * bound, rel=0.01)


def test_averaged_cuts_overload_a_receiver():
    """Sixteen disjoint supports: averages of quantiles all lie in the middle, and one rank gets nearly half of everything."""
    average = measured(16, "disjoint", k=1600, cuts="average", owners="rank")[0]
    histogram = measured(16, "disjoint", k=1600)[0]
    bound = 6 * 1600 * 15 / 16
    assert max(of_rank.words("received") for of_rank in average) > 2.5 * bound
    assert max(of_rank.words("received") for of_rank in histogram) < 0.4 * bound


def test_the_sixteen_bit_format_sends_at_most_half():
    for kind in ("random", "lopsided"):
        wide = measured(4, kind)[0]
        narrow = measured(4, kind, indices="delta16", values="bfloat16")[0]
        for before, after in zip(wide, narrow, strict=True):
            assert after.selected == before.selected == K
            padding = 4 * WORST_PADDING
            assert after.words("sent") <= before.words("sent") / 2 + padding
            assert after.words("received") <= before.words("received") / 2 + padding


@pytest.mark.parametrize("count", [2, 5])
def test_the_small_words_are_few(count):
    """Counts and agreement at every step (all ranks are told all counts), 4 x 256 counts of 4 bytes for a threshold, histograms
    for a partition."""
    share = 2 * (count - 1) / count
    cuts = 0
    for moved in measured(count, "moved", 6, threshold="reused", repartition_every=4):
        of_rank = moved[0]
        assert of_rank.sent["agreement"] <= share * 80
        assert of_rank.sent["counts"] <= 2 * 8 * count * (count - 1) + 112 * (count - 1)
        assert of_rank.sent.get("threshold", 0) <= share * 4 * 4 * 256
        assert of_rank.sent.get("threshold", 0) > 0 or not of_rank.exact
        fresh, cuts = of_rank.partitions - cuts, of_rank.partitions
        # Up to four rounds of histograms, of 256 bins or of as many for all cuts together, and everyone's counts.
        assert of_rank.sent.get("cuts", 0) <= fresh * (4 * share * 4 * 256 + 8 * count * (count - 1))
        assert set(of_rank.sent) <= {*PHASES, "agreement", "counts", "threshold", "cuts"}


def test_fillers_of_far_entries_do_not_cut_anew_every_step():
    """Where distances are above 65,535 the 16-bit code sends fillers; fresh cuts send as many."""
    case = Case("random", 4_000_000, 12, 4, settings={"indices": "delta16", "values": "exact", "threshold": "reused"})
    for of_rank in threads.run(measure, 2, case):
        assert [moved.partitions for moved in of_rank][-1] <= 2


def test_cuts_are_made_when_it_is_time_and_when_an_owner_would_be_overloaded():
    """Steady supports are cut again after the interval alone, though a region may hold the granularity more than k."""
    for kind, partitions in (
        ("one_rank", [1, 1, 1, 1, 2, 2]),
        ("shifted", [1, 1, 1, 1, 2, 2]),
        ("gathering", [1, 1, 2, 2, 2, 2]),
    ):
        steps = measured(3, kind, 6, repartition_every=4, threshold="exact", owners="rank")
        assert [moved[0].partitions for moved in steps] == partitions, kind


def test_planned_words_are_the_counted_ones():
    """Whoever knows the supports knows the bytes: entries that change hands, 8 bytes each, and up to 7 of padding a message."""
    count = 5
    moved = measured(count, "random", owners="rank")[0]
    counts = np.array([of_rank.counts for of_rank in moved])
    for rank, of_rank in enumerate(moved):
        sent = 8 * (counts[rank].sum() - counts[rank, rank])
        received = 8 * (counts[:, rank].sum() - counts[rank, rank])
        assert sent <= of_rank.sent["split_and_reduce"] <= sent + 8 * count
        assert received <= of_rank.received["split_and_reduce"] <= received + 8 * count


def interface_bytes():
    """Return what this host's interface has sent and received, without headers: Ethernet, IP and TCP with time stamps are 66."""
    fields = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0" in line).split(":")[1].split()
    received, received_packets, sent, sent_packets = (int(fields[i]) for i in (0, 1, 8, 9))
    return np.array([sent - 66 * sent_packets, received - 66 * received_packets])


def on_a_host(rank, count, size, k, steps):
    state = SparseAllreduceState(indices="int32")
    generator = torch.Generator().manual_seed(rank)
    acc = torch.zeros(size)
    rows = []
    for _ in range(steps):
        acc += torch.randn(size, generator=generator)
        state.traffic.clear()
        dist.barrier()
        time.sleep(0.3)  # until the last acknowledgement is through
        before = interface_bytes()
        sparse_allreduce(acc, k, state=state)
        dist.barrier()
        time.sleep(0.3)
        rows.append((state.traffic.total_bytes(), tuple(interface_bytes() - before)))
    return rows


@pytest.mark.netns
def test_interfaces_count_the_same(ranks, hosts):
    """Sixteen million elements, 1 %, on four hosts: within 5 %, and within the bound with everything that is small."""
    count, size, k = 4, 1 << 24, (1 << 24) // 100
    network = hosts(count)
    for rows in ranks.run(on_a_host, count, size, k, 3, hosts=network.place(*range(count)), timeout_s=120):
        for counted, seen in rows:
            assert np.array(seen) == pytest.approx(np.array(counted), rel=0.05)
            assert max(seen) / 4 <= 6 * k * (count - 1) / count * 1.05
