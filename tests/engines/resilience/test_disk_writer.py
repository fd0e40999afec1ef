"""The disk writer as a real process: what it writes, what it skips, what it survives, and that nothing of it stays."""

import os
import random
import signal
import subprocess
import time

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.failpoints import VARIABLE
from lightning_plugins.engines.resilience.disk import read_step, steps, write_step
from lightning_plugins.engines.resilience.disk_client import DiskWriter
from lightning_plugins.engines.resilience.disk_folder import claim, mark_ended, read_run
from lightning_plugins.engines.resilience.keeper_client import KeeperClient
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import alive, assert_is_state_of, client, eventually, folder, state_of
from tests.ranks.rank import progress

__all__ = ["client", "folder"]
SHARDS = ["shared", "rank0"]
NUMBERS = 20_000


def capture(client, step, numbers=NUMBERS):
    for shard in SHARDS:
        client.capture(shard, pack(state_of(step, numbers)), step, {"step": step})
    for shard in SHARDS:
        client.wait_sealed(shard, step, 10)
    client.commit(SHARDS[0], step)


def check(disk_dir, numbers=NUMBERS):
    """Check every step that is shown, and return their numbers."""
    found = steps(disk_dir)
    for one in found:
        assert (one.damage, one.meta) == ("", {"step": one.step})
        for shard in SHARDS:
            assert_is_state_of(read_step(one.path, shard), one.step, numbers)
    return [one.step for one in found]


@pytest.fixture
def started(client, tmp_path):
    """Make writers, and end those that a test leaves."""
    made = []

    def start(disk_dir=tmp_path / "disk", **options):
        made.append(DiskWriter(disk_dir, client.folder, "job", SHARDS, **options))
        return made[-1]

    yield start
    for writer in made:
        if alive(writer.pid):
            os.kill(writer.pid, signal.SIGKILL)
        writer.close(clean=False)
        assert eventually(lambda pid=writer.pid: not alive(pid))


def has_written(writer, step):
    return eventually(lambda: writer.status().newest == step, 30)


def test_committed_steps_come_to_the_disk(client, started, tmp_path):
    writer = started()
    for step in (10, 20, 30):
        capture(client, step)
        writer.persist(step)
        assert has_written(writer, step)
    status = writer.status()
    assert (status.writing, status.waiting, status.skipped, status.failures, status.is_running) == (-1, -1, 0, (), True)
    assert check(tmp_path / "disk") == [30, 20]
    assert read_run(tmp_path / "disk") == {"format": 1, "job": "job", "ended": False}
    assert os.getpriority(os.PRIO_PROCESS, writer.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    assert os.getsid(writer.pid) == writer.pid
    writer.close(clean=True)
    assert not alive(writer.pid)
    assert check(tmp_path / "disk") == [30, 20]
    assert read_run(tmp_path / "disk")["ended"] is True
    writer.close(clean=True)


def test_there_is_no_queue(client, started, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "resilience/disk/file_sync=sleep:1.5")
    writer = started()
    capture(client, 1)
    writer.persist(1)
    assert eventually(lambda: writer.status().writing == 1, 30)
    for step in range(2, 8):
        capture(client, step)
        start = time.perf_counter()
        writer.persist(step)
        assert time.perf_counter() - start < 0.1
    assert has_written(writer, 7)
    assert writer.status().skipped == 5
    assert check(tmp_path / "disk") == [7, 1]


def train(rank, world_size, keeper_folder, disk_dir, every, numbers, linger_s=60.0):
    client = KeeperClient("job", folder=keeper_folder, linger_s=linger_s)
    writer = DiskWriter(disk_dir, keeper_folder, "job", SHARDS, linger_s=linger_s)
    progress(("writer", writer.pid))
    if os.fork() == 0:  # like a loader's worker: it has inherited the pipe to the writer, and outlives the trainer
        time.sleep(60)
        os._exit(0)
    for step in range(1, 100_000):
        capture(client, step, numbers)
        progress(("committed", step))
        if step % every == 0:
            writer.persist(step)
            progress(("told", step))


def survivor(handle):
    return next(value[1] for _, value, _ in handle.messages if value[0] == "writer")


@pytest.mark.parametrize("every", [1, 1000])
def test_a_dead_trainers_newest_step_comes_to_the_disk(folder, client, ranks, tmp_path, every):
    """Whether it was told of any step or not."""
    draws = random.Random(every)
    for trial in range(2):
        disk_dir = tmp_path / f"disk{trial}"
        with ranks.start(train, 1, str(folder), str(disk_dir), every, NUMBERS, init=False) as handle:
            handle.wait_for(("committed", 3), timeout_s=60)
            handle.kill_at(0, seconds=draws.uniform(0, 0.5))
            assert handle.join(30) == [-signal.SIGKILL]
            committed = max(one.step for one in client.generations("shared") if one.state == "committed")
            assert eventually(lambda handle=handle: not alive(survivor(handle)), 30)
        assert check(disk_dir)[0] == committed
        assert read_run(disk_dir)["ended"] is False
        for shard in SHARDS:
            for one in client.generations(shard):
                client.discard(shard, one.step)


def test_sigterm_has_it_write_the_newest_step_and_end(client, started, tmp_path):
    writer = started()
    capture(client, 1)
    writer.persist(1)
    assert has_written(writer, 1)
    capture(client, 2)
    os.kill(writer.pid, signal.SIGTERM)
    assert eventually(lambda: not writer.status().is_running, 30)
    assert check(tmp_path / "disk") == [2, 1]


@pytest.mark.parametrize("clean", [True, False])
def test_who_asks_and_does_not_wait_for_the_answer(client, started, tmp_path, clean):
    """The writer is only starting when it is asked, and answers when nobody listens any more."""
    writer = started()
    capture(client, 1)
    for _ in range(3):
        assert writer.status(timeout_s=0.01).newest == -1
    if not clean:
        writer.close(clean=False)
        assert eventually(lambda: not alive(writer.pid), 30)
        assert check(tmp_path / "disk") == [1]
        return
    writer.persist(1)
    assert has_written(writer, 1)
    writer.status(timeout_s=0)
    capture(client, 2)
    time.sleep(0.5)  # the answer is there by now, and nobody has read it
    writer.persist(2)
    assert eventually(lambda: check(tmp_path / "disk") == [2, 1], 30)
    time.sleep(0.5)
    assert writer.status().newest == 2
    writer.close(clean=True)
    assert not alive(writer.pid)


def test_what_was_never_committed_is_not_written(client, started, tmp_path):
    writer = started()
    capture(client, 1)
    for shard in SHARDS:
        client.capture(shard, pack(state_of(2, NUMBERS)), 2, {"step": 2})
        client.wait_sealed(shard, 2, 10)
    writer.close(clean=False)
    assert eventually(lambda: not alive(writer.pid), 30)
    assert check(tmp_path / "disk") == [1]


def test_a_full_disk_costs_the_disk_tier_only(client, started, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False).returncode:
        pytest.skip("no small disk can be mounted")
    try:
        writer = started(small)
        capture(client, 1)
        writer.persist(1)
        assert has_written(writer, 1)
        capture(client, 2, 200_000)
        writer.persist(2)
        assert eventually(lambda: writer.status().failures, 30)
        ((step, reason),) = writer.status().failures
        assert (step, writer.status().newest, writer.status().is_running) == (2, 1, True)
        assert reason.startswith(f"nothing can be kept in {small}: No space left on device; free space")
        assert sorted(os.listdir(small)) == ["run.json", "step-000000001"]
        capture(client, 3)
        writer.persist(3)
        assert has_written(writer, 3)
        assert check(small) == [3, 1]
        writer.close(clean=True)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def test_a_writer_that_dies_is_started_again(client, started, tmp_path):
    writer = started()
    capture(client, 1)
    writer.persist(1)
    assert has_written(writer, 1)
    os.kill(writer.pid, signal.SIGKILL)
    assert eventually(lambda: not writer.status().is_running)
    assert writer.status().newest == 1
    capture(client, 2)
    writer.persist(2)
    assert has_written(writer, 2)
    assert check(tmp_path / "disk") == [2, 1]
    writer.close(clean=True)


def test_a_run_that_goes_on_keeps_its_past_and_no_other(client, started, tmp_path):
    claim(tmp_path / "disk", "job")
    for step in (5, 8):
        write_step(tmp_path / "disk", step, {shard: state_of(step, NUMBERS) for shard in SHARDS}, {"step": step})
    writer = started(resumed_from=6)
    assert writer.status().newest == 5
    capture(client, 9)
    writer.persist(9)
    assert has_written(writer, 9)
    assert check(tmp_path / "disk") == [9, 5]
    writer.close(clean=True)
    mark_ended(tmp_path / "disk")
    writer = started()
    assert writer.status().newest == -1
    capture(client, 10)
    writer.persist(10)
    assert has_written(writer, 10)
    assert eventually(lambda: check(tmp_path / "disk") == [10])
    assert eventually(lambda: read_run(tmp_path / "disk")["ended"] is False)


def test_a_run_on_one_host_ends_the_starts_of_several(client, started, tmp_path):
    left = tmp_path / "disk" / ".start-000002-0123456789abcdef"
    (left / "node1" / "step-000000001").mkdir(parents=True)
    writer = started()
    capture(client, 1)
    writer.persist(1)
    assert has_written(writer, 1)
    assert sorted(os.listdir(tmp_path / "disk")) == ["run.json", "step-000000001"]


def test_without_a_keeper_it_says_so_and_starts_none(client, started, tmp_path):
    writer = started()
    capture(client, 1)
    writer.persist(1)
    assert has_written(writer, 1)
    os.kill(client.keeper_pid, signal.SIGKILL)
    assert eventually(lambda: not alive(client.keeper_pid))
    writer.persist(2)
    assert eventually(lambda: writer.status().failures, 10)
    assert "step 2 is in no keeper's memory any more" in writer.status().failures[0][1]
    writer.close(clean=False)
    assert eventually(lambda: not alive(writer.pid), 10)
    # The killed one's socket and lock are left, and whoever comes next removes them.
    KeeperClient("job", folder=client.folder).close()


@pytest.mark.parametrize("groups", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_starts_leave_nothing(client, started, tmp_path, groups):
    capture(client, 1)
    before = set(os.listdir("/proc/self/fd"))
    writers = []
    for _ in range(groups):
        group = [started(tmp_path / f"disk{len(writers) + number}") for number in range(5)]
        for number, writer in enumerate(group):
            writer.persist(1)
            if number == 0:
                os.kill(writer.pid, signal.SIGKILL)
        for number, writer in enumerate(group):
            writer.close(clean=number % 2 == 0)
        writers += group
    assert eventually(lambda: not any(alive(writer.pid) for writer in writers), 60)
    assert set(os.listdir("/proc/self/fd")) == before
    for number in range(5 * groups):
        assert set(os.listdir(tmp_path / f"disk{number}")) <= {"run.json", "step-000000001"}


def test_a_foreign_folder_is_refused_where_the_user_sees_it(client, started, tmp_path):
    claim(tmp_path / "disk", "other")
    with pytest.raises(InputError, match="belongs to job 'other', not to job 'job'"):
        started()
    with pytest.raises(InputError, match="keep must be 1 or more"):
        started(tmp_path / "new", keep=0)
