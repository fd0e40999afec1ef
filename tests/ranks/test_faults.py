"""Faults that a test inflicts on ranks while they run: kills, stops, and kills drawn from the clock."""

import os
import re
import signal
import time
from itertools import islice

import pytest
import torch
import torch.distributed as dist

from tests.ranks import linux
from tests.ranks.client import RankFailure, RankTimeout, kill_times
from tests.ranks.rank import progress


def steps_forever(rank, world_size):
    step = 0
    while True:
        progress(step)
        step += 1
        time.sleep(0.005)


def barrier_forever(rank, world_size):
    progress("ready")
    while True:
        dist.barrier()


def test_a_kill_is_real_and_its_peer_is_told(ranks):
    with ranks.start(barrier_forever, 3) as handle:
        handle.wait_for("ready")
        assert handle.exit_codes == [None, None, None]
        handle.kill(1)
        assert handle.join(20) == [1, -signal.SIGKILL, 1]
        assert re.search("Connection (closed|reset) by peer", handle.error(0))
        assert handle.error(1) == ""
        with pytest.raises(RankFailure, match="rank 1 of 3 was killed by SIGKILL"):
            handle.results()


def test_run_reports_a_killed_rank(ranks):
    with pytest.raises(RankFailure, match="rank 0 of 2 was killed by SIGTERM"):
        ranks.run(terminates_itself, 2, init=False)


def terminates_itself(rank, world_size):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_rank_stands_still_until_it_is_continued(ranks):
    with ranks.start(steps_forever, 2, init=False) as handle:
        handle.wait_for(1)
        handle.stop(0)
        handle.wait_for(20, ranks=[1])
        assert linux.state(handle.pids[0]) == "T"
        stopped_at = max(value for rank, value, _ in handle.messages if rank == 0)
        start = max(value for rank, value, _ in handle.messages if rank == 1)
        handle.wait_for(start + 20, ranks=[1])
        assert max(value for rank, value, _ in handle.messages if rank == 0) == stopped_at
        with pytest.raises(RankTimeout, match=r"stack of rank 0\n\(stopped by SIGSTOP\)(.|\n)*in steps_forever"):
            handle.join(0.1)
        handle.cont(0)
        handle.wait_for(stopped_at + 5, ranks=[0])
        handle.terminate(0)
        handle.kill(1)
        assert handle.join(10) == [-signal.SIGTERM, -signal.SIGKILL]


def test_a_stopped_rank_is_gone_after_the_block(ranks):
    with ranks.start(steps_forever, 2, init=False) as handle:
        handle.wait_for(0)
        handle.stop(1)
    assert [linux.state(pid) for pid in handle.pids] == ["", ""]


def test_kills_come_at_the_drawn_time(ranks):
    """The clock is the kernel's monotonic one, the same in every process: message and kill times can be compared."""
    with ranks.start(steps_forever, 2, init=False) as handle:
        handle.wait_for(0)
        asked_at = time.monotonic()
        handle.kill_at(1, 0.3)
        handle.kill_at(0, 0.1)
        assert handle.join(10) == [-9, -9]
        (first, _, first_at), (second, _, second_at) = handle.signals
        assert (first, second) == (0, 1)
        assert 0.1 <= first_at - asked_at < 0.6
        assert 0.3 <= second_at - asked_at < 0.8
        last_words = max(time_s for rank, _, time_s in handle.messages if rank == 0)
        assert first_at - 0.5 < last_words < first_at + 0.01


def test_a_kill_after_the_end_hits_nobody(ranks):
    with ranks.start(terminates_itself, 2, init=False) as handle:
        handle.kill_at(1, 0.4)
        assert handle.join(10) == [-signal.SIGTERM, 0]
        time.sleep(0.5)
        assert handle.exit_codes == [-signal.SIGTERM, 0]
        assert handle.signals == []


def test_drawn_kills_repeat_with_their_seed():
    drawn = list(islice(kill_times(7, 4, 0.5), 200))
    assert drawn == list(islice(kill_times(7, 4, 0.5), 200))
    assert drawn != list(islice(kill_times(8, 4, 0.5), 200))
    assert {rank for rank, _ in drawn} == {0, 1, 2, 3}
    seconds = sorted(second for _, second in drawn)
    assert 0 <= seconds[0] < 0.05
    assert 0.45 < seconds[-1] < 0.5


def writes_in_halves(rank, world_size):
    """A large message, killed while it is on its way most of the time."""
    progress("started")
    for step in range(10_000):
        progress((step, torch.full((500_000,), float(step))))


@pytest.mark.parametrize("trial", range(5))
def test_a_message_cut_by_a_kill_is_dropped_whole(ranks, trial):
    with ranks.start(writes_in_halves, 1, init=False) as handle:
        handle.wait_for("started")
        handle.kill_at(0, 0.01 * trial)
        handle.join(10)
        steps = [value for _, value, _ in handle.messages if value != "started"]
    assert [step for step, _ in steps] == list(range(len(steps)))
    assert all(torch.equal(tensor, torch.full((500_000,), float(step))) for step, tensor in steps)


def ends_early(rank, world_size):
    progress("started")
    if rank == 1:
        raise ValueError("this rank never gets to step 1")
    time.sleep(600)


def test_waiting_for_a_dead_rank_ends_at_once(ranks):
    with ranks.start(ends_early, 2, init=False) as handle:
        with pytest.raises(RankFailure, match="never gets to step 1"):
            handle.wait_for("step 1")
        with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
            handle.kill(2)


def fails_at_the_second_save(rank, world_size):
    from lightning_plugins._support.failpoints import failpoint

    for step in range(3):
        progress(step)
        if rank == 1:
            failpoint("test/save")
    return step


def test_failpoints_reach_ranks_through_the_variable(ranks):
    environment = {"LIGHTNING_PLUGINS_FAILPOINTS": "test/save=kill:2"}
    with ranks.start(fails_at_the_second_save, 2, init=False, env=environment) as handle:
        assert handle.join(10) == [0, -signal.SIGKILL]
        assert handle.result(0) == 2
        assert [value for rank, value, _ in handle.messages if rank == 1] == [0, 1]
        with pytest.raises(RankFailure, match="rank 1 of 2 was killed by SIGKILL"):
            handle.result(1)
