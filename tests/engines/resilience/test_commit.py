"""A step is the job's on all ranks or on none, whoever is late: real keepers, a real store, and ranks that are threads."""

import random
import threading
import time

import pytest
import torch
from torch.distributed import TCPStore

from lightning_plugins._support.failpoints import armed
from lightning_plugins.engines.resilience.agreement import common_steps, everywhere
from lightning_plugins.engines.resilience.commit import JobCommit, make_store
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.state_tree import pack


class Rank:
    """A rank on a host of its own: a client of another job in the same keeper sees nothing of it.

    Args:
        number: of the rank.
        folder: of the keeper.
        store: of the job.
        ranks: their number.
    """

    def __init__(self, number, folder, store, ranks):
        self.client = KeeperClient(f"host{number}", folder=folder)
        self.commit = JobCommit(self.client, ["own"], store, ranks)

    def capture(self, step):
        self.client.capture("own", pack({"step": step, "weights": torch.full((100,), float(step))}), step, {})
        self.commit.follow(step)

    def committed(self):
        return sorted(one.step for one in self.client.generations() if one.state == "committed")


@pytest.fixture
def make_ranks(tmp_path):
    folder = tmp_path / "keeper"
    folder.mkdir(mode=0o700)
    made = []

    def make(count):
        server = make_store(0, count, "127.0.0.1")
        stores = [server, *(TCPStore("127.0.0.1", server.port, None, False) for _ in range(count - 1))]
        made.extend(Rank(number, folder, store if count > 1 else None, count) for number, store in enumerate(stores))
        return made

    yield make
    for rank in made:
        rank.commit.settle()
    for rank in made:
        rank.client.end()
        rank.client.close()


def eventually(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_rank_commits_what_it_has_sealed(make_ranks):
    (rank,) = make_ranks(1)
    rank.capture(3)
    rank.commit.settle(10.0)
    assert (rank.commit.committed, rank.committed()) == (3, [3])


def test_a_step_is_committed_when_the_last_rank_has_sealed_it(make_ranks):
    first, second, third = make_ranks(3)
    first.capture(5)
    second.capture(5)
    time.sleep(0.1)
    assert first.committed() == second.committed() == []
    third.capture(5)
    for rank in (first, second, third):
        rank.commit.settle(10.0)
        assert (rank.commit.committed, rank.commit.abandoned, rank.committed()) == (5, 0, [5])


def test_a_rank_that_cannot_wait_abandons_the_step_for_all(make_ranks):
    first, second = make_ranks(2)
    first.capture(5)
    first.commit.settle()
    second.capture(5)
    second.commit.settle(10.0)
    assert [(rank.commit.abandoned, rank.committed()) for rank in (first, second)] == [(1, []), (1, [])]
    for rank in (first, second):
        rank.capture(6)
    for rank in (first, second):
        rank.commit.settle(10.0)
        assert rank.committed() == [6]


def test_whoever_is_late_by_whatever_all_decide_alike(make_ranks):
    """A hundred steps, each rank at a time of its own, and in a hurry or not."""
    ranks, draws = make_ranks(2), random.Random(1)
    outcomes = set()
    for step in range(1, 101):
        plan = [(draws.uniform(0, 0.006), draws.choice([0.0, 0.002, 0.004])) for _ in ranks]

        def take(rank, wait_s, patient_s, step=step):
            time.sleep(wait_s)
            rank.capture(step)
            rank.commit.settle(patient_s)

        threads = [threading.Thread(target=take, args=(rank, *times)) for rank, times in zip(ranks, plan, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        newest = [rank.commit.committed == step for rank in ranks]
        assert newest[0] == newest[1], f"step {step}"
        outcomes.add(newest[0])
        held = [set(rank.committed()) for rank in ranks]
        assert held[0] & held[1] or ranks[0].commit.committed < 0, "at every moment there is a step that all ranks have"
    assert outcomes == {True, False}


def test_a_lost_keeper_is_told_where_the_training_can_see_it(make_ranks):
    (rank,) = make_ranks(1)
    with armed("resilience/commit/sealed=raise"):
        rank.capture(1)
        with pytest.raises(RuntimeError, match="resilience/commit/sealed"):
            rank.commit.settle(10.0)
    rank.commit.settle()
    rank.client.close()
    with pytest.raises(KeeperError):
        rank.client.generations()
    rank.client = KeeperClient("host0", folder=rank.client.folder)


def named(rank, world_size, steps):
    return common_steps(steps[rank]), everywhere(rank < world_size - 1), everywhere(rank >= 0)


def test_ranks_go_on_from_what_all_of_them_have(ranks):
    lists = [[8, 6], [6, 8, 4], [10, 8, 6]]
    assert ranks.run(named, 3, lists) == [([8, 6], False, True)] * 3
    assert ranks.run(named, 2, [[8, 6], [4]]) == [([], False, True)] * 2
    assert common_steps([2, 9, 4]) == [9, 4, 2]
