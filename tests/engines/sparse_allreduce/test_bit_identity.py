"""The same bits on every rank and in every repeat, in real processes of a gloo group."""

import pytest

from tests.engines.sparse_allreduce.cases import Case, play

REPEATS = 5
CASES = [
    Case("heavy", 1000, 60, 3, settings={"threshold_every": 2}),
    Case("drifting", 1000, 60, 3, settings={"values": "bfloat16", "indices": "delta16"}),
    Case("random", 1000, 60, 4, settings={"threshold": "reused", "threshold_every": 3}),
]


def check(ranks, count, cases):
    """Run cases of the same gradients over and over; every rank and repeat has to give the same bytes."""
    repeated = [case for case in cases for _ in range(REPEATS)]
    results = ranks.run(play, count, repeated, False)
    for number, case in enumerate(cases):
        runs = range(number * REPEATS, (number + 1) * REPEATS)
        for step in range(case.steps):
            assert len({of_rank[run][step].crc for of_rank in results for run in runs}) == 1, (case, step)
    assert len({played.crc for case in results[0] for played in case}) > 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_ranks_and_repeats(ranks, count):
    check(ranks, count, CASES)


def test_again_in_new_processes(ranks):
    """Processes that start in another order, with other addresses."""
    first, second = (ranks.run(play, 4, CASES[:1], False) for _ in range(2))
    assert [played.crc for played in first[0][0]] == [played.crc for played in second[3][0]]


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 6, 7, 12, 15, 16])
def test_all_ranks_and_repeats_of_many(ranks, count):
    check(ranks, count, CASES)
