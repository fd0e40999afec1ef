"""The keeper as a real process: what it keeps, whom it serves, what it refuses, and how it ends."""

import gc
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience import keeper_folder, slot_tensors, slots
from lightning_plugins.engines.resilience.host_memory import available_bytes
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, TooLittleMemoryError, block_bytes
from lightning_plugins.engines.resilience.keeper_folder import KeeperError, KeeperLostError, private_folder
from lightning_plugins.engines.resilience.keeper_records import Records
from lightning_plugins.engines.resilience.messages import MAX_BYTES, receive, send
from lightning_plugins.engines.resilience.slots import HEADER_BYTES, DamagedError
from lightning_plugins.engines.resilience.state_tree import pack
from tests.engines.resilience.keeper_parts import (
    alive,
    assert_is_state_of,
    assert_same,
    client,
    eventually,
    folder,
    keeper_of,
    state_of,
    wide_state,
)

__all__ = ["client", "folder"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def keep(client, step, shard="rank0", numbers=1000, commit=True):
    client.capture(shard, pack(state_of(step, numbers)), step, {"of": step})
    client.wait_sealed(shard, step, 10)
    if commit:
        client.commit(shard, step)


def held(client, shard=None):
    return sorted((kept.shard, kept.step, kept.state) for kept in client.generations(shard))


def blocks_of(pid):
    """Return a path for each block of memory that a process holds, by the block's number in the kernel."""
    paths = [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    return {os.stat(path).st_ino: path for path in paths if "lightning-plugins-slot" in os.readlink(path)}


# What is kept


def test_a_state_outlives_its_client_bit_by_bit(folder, client):
    state = wide_state()
    packed = pack(state)
    with KeeperClient("other", folder=folder) as writer:
        captured = writer.capture("rank0", packed, 12, {"epoch": 1})
        writer.wait_sealed("rank0", 12, 10)
        writer.commit("rank0", 12)
    with KeeperClient("other", folder=folder) as reader:
        (kept,) = reader.generations()
        assert (kept.shard, kept.step, kept.state, kept.meta) == ("rank0", 12, "committed", {"epoch": 1})
        assert kept.bytes == captured.bytes >= packed.tensor_bytes
        assert abs(kept.written_at - time.time()) < 10
        found, meta = reader.load("rank0", 12)
        assert_same(found, state)
        assert meta == {"epoch": 1}
    assert client.generations() == []


def test_two_newest_steps_of_each_shard_are_kept(client):
    for step in (10, 20, 30):
        for shard in ("rank0", "rank1"):
            keep(client, step, shard)
    assert held(client) == [(shard, step, "committed") for shard in ("rank0", "rank1") for step in (20, 30)]
    assert held(client, "rank1") == [("rank1", 20, "committed"), ("rank1", 30, "committed")]
    for step in (20, 30):
        assert_is_state_of(client.load("rank1", step)[0], step, 1000)
    with pytest.raises(KeeperError, match=r"holds no whole step 10; it holds (20|30) \(committed\)"):
        client.load("rank1", 10)


def test_a_commit_counts_for_all_shards_that_have_sealed_the_step(client):
    keep(client, 10, "rank0", commit=False)
    keep(client, 10, "rank1", commit=False)
    client.capture("rank2", pack(state_of(9, 10)), 9, {})
    client.wait_sealed("rank2", 9, 10)
    client.commit("rank0", 10)
    assert held(client) == [("rank0", 10, "committed"), ("rank1", 10, "committed"), ("rank2", 9, "sealed")]
    with pytest.raises(KeeperError, match=r"'rank2' holds no whole step 10; it holds 9 \(sealed\)"):
        client.commit("rank2", 10)


def test_what_was_committed_last_is_whole_after_every_request(client):
    """Random requests beside a model that knows one rule: the last commit that was not discarded can be read."""
    draws = random.Random(5)
    last, sealed, writing = None, set(), None
    for step in range(1, 60):
        deed = draws.choice(["begin", "capture", "capture", "commit", "commit", "reserve"])
        if deed == "begin":
            writing = client.begin("s", pack(state_of(step, 100)), step, {})
            writing.copy([0])
        elif deed == "reserve":
            client.reserve("s", draws.randrange(300_000))
        elif deed == "capture":
            keep(client, step, "s", 100, commit=False)
            sealed.add(step)
        elif sealed & {kept.step for kept in client.generations() if kept.state == "sealed"}:
            last = max(kept.step for kept in client.generations() if kept.state == "sealed")
            client.commit("s", last)
        if last is not None:
            assert_is_state_of(client.load("s", last)[0], last, 100)
    assert last is not None


def test_the_last_commit_is_kept_even_if_its_step_is_the_lower_one(client):
    keep(client, 10)
    keep(client, 20)
    client.discard("rank0", 20)
    assert held(client) == [("rank0", 10, "committed")]
    keep(client, 15, commit=False)
    client.commit("rank0", 10)  # said twice, and not the last one for that once 15 is committed
    assert held(client) == [("rank0", 10, "committed"), ("rank0", 15, "sealed")]
    client.commit("rank0", 15)
    client.commit("rank0", 10)
    client.begin("rank0", pack({}), 16, {})
    assert held(client) == [("rank0", 15, "committed"), ("rank0", 16, "writing")]


def test_a_slot_that_is_written_says_so_itself(client):
    keep(client, 1)
    keep(client, 2)
    words = [slots.generation_of(Path(path).read_bytes()) for path in blocks_of(client.keeper_pid).values()]
    assert sorted(words)[0] > 0
    client.begin("rank0", pack({}), 3, {})
    words = [slots.generation_of(Path(path).read_bytes()) for path in blocks_of(client.keeper_pid).values()]
    assert sorted(words)[0] == 0 < sorted(words)[1]


def test_copy_and_seal_apart_and_from_another_thread(client):
    state = state_of(4, 1000)
    packed = pack(state)
    writing = client.begin("rank0", packed, 4, {})
    writing.copy([len(packed.tensors) - 1])
    for whole_only in (client.load, client.commit):
        with pytest.raises(KeeperError, match="holds no whole step 4; it holds no step at all"):
            whole_only("rank0", 4)
    with pytest.raises(RuntimeError, match="3 tensors of shard 'rank0' have not been copied"):
        writing.seal()
    thread = threading.Thread(target=lambda: (writing.copy(), writing.seal()))
    thread.start()
    thread.join()
    client.wait_sealed("rank0", 4, 10)
    assert_is_state_of(client.load("rank0", 4)[0], 4, 1000)


def test_others_are_served_while_checksums_are_computed(folder, client):
    packed = pack([torch.zeros(64 << 20)])
    client.reserve("big", block_bytes(packed, {}))
    with KeeperClient("job", folder=folder) as other:
        client.capture("big", packed, 1, {})
        assert held(other) == [("big", 1, "writing")]
        with pytest.raises(KeeperError, match="holds no whole step 1"):
            other.load("big", 1)
        keep(other, 1, "small")
        client.wait_sealed("big", 1, 30)


def test_memory_is_reused_and_grows_when_it_has_to(client):
    for step in range(5):
        keep(client, step, numbers=1000)
    small = client.status()["jobs"]["job"]
    keep(client, 5, numbers=100_000)
    keep(client, 6, numbers=100_000)
    large = client.status()["jobs"]["job"]
    assert small < 300_000 < 2 * 1_200_000 < large < 2 * 1_200_000 + 300_000
    keep(client, 7, numbers=1000)
    assert client.status()["jobs"]["job"] == large
    assert len(blocks_of(client.keeper_pid)) == 2


def test_a_late_writer_writes_to_nobodys_memory(folder, client):
    """What a hanging trainer still does to its slot does not reach the slot of its successor."""
    late = client.begin("rank0", pack(state_of(1, 1000)), 1, {})
    with KeeperClient("job", folder=folder) as successor:
        for step in (2, 3, 4):
            keep(successor, step)
        late.copy()
        with pytest.raises(KeeperError, match="has no generation"):
            late.seal()
        for step in (3, 4):
            assert_is_state_of(successor.load("rank0", step)[0], step, 1000)


def test_what_is_overwritten_while_it_is_read_is_not_given_out(folder, client, monkeypatch):
    keep(client, 1)
    read_packed = slot_tensors.read_packed

    def overwritten_first(block, manifest):
        with KeeperClient("job", folder=folder) as other:
            for step in (2, 3):
                keep(other, step)
        return read_packed(block, manifest)

    monkeypatch.setattr(slot_tensors, "read_packed", overwritten_first)
    with pytest.raises(KeeperError, match="step 1 of shard 'rank0' was overwritten while it was read"):
        client.load("rank0", 1)


def test_a_commit_during_the_wait_for_checksums_changes_which_slot_is_free():
    records = Records()
    records.join(1, "job", 0)

    def sealed(step):
        _, generation, _ = records.begin(1, "job", "s", step, 10_000)
        slot, _ = records.start_seal(1, "job", "s", generation)
        return slot, generation, ({"meta": {}, "data_bytes": 0}, b"")

    records.finish_seal(*sealed(1))
    records.commit("job", "s", 1)
    second = sealed(2)
    thread = threading.Thread(target=records.begin, args=(1, "job", "s", 3, 10_000))
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    with records._changed:  # both before the waiting thread looks again
        records.finish_seal(*second)
        records.commit("job", "s", 2)
    thread.join(5)
    held = {(kept["step"], kept["state"]) for kept in records.generations("job", "s")}
    assert held == {(2, "committed"), (3, "writing")}


def test_a_capture_that_was_given_up_does_not_write_into_the_next(client):
    keep(client, 1)
    late = client.begin("rank0", pack(state_of(2, 1000)), 2, {})
    late.copy([0])
    keep(client, 3, commit=False)
    late.copy()
    assert_is_state_of(client.load("rank0", 3)[0], 3, 1000)


# What is damaged


@pytest.mark.parametrize("kind", ["bit", "byte", "page", "swapped", "other step"])
def test_damage_is_found_and_the_step_before_still_loads(client, kind):
    numbers = 1_100_000  # more than one chunk
    keep(client, 1, numbers=numbers)
    ((number, first),) = blocks_of(client.keeper_pid).items()
    keep(client, 2, numbers=numbers)
    (second,) = (path for other, path in blocks_of(client.keeper_pid).items() if other != number)
    with open(second, "r+b", buffering=0) as block:
        place = HEADER_BYTES + (4 << 20) + 12345
        block.seek(place)
        before = block.read(4096)
        block.seek(place)
        if kind == "bit":
            block.write(bytes([before[0] ^ 16]))
        elif kind == "byte":
            block.write(bytes([(before[0] + 100) % 256]))
        elif kind == "page":
            block.write(bytes(4096))
        elif kind == "swapped":
            block.write(before[64:128] + before[:64])
        else:
            block.seek(0)
            block.write(Path(first).read_bytes())
    with pytest.raises(DamagedError, match="shard 'rank0' of step 2") as caught:
        client.load("rank0", 2)
    assert caught.value.chunk == (None if kind == "other step" else 1)
    assert_is_state_of(client.load("rank0", 1)[0], 1, numbers)


# Who is served


@needs_root
def test_another_user_is_refused(folder, client):
    """By the folder, and, should that ever be open, by what the kernel says of the peer."""
    program = """
import os, socket, sys
os.seteuid(54321)
connection = socket.socket(socket.AF_UNIX)
try:
    connection.connect(sys.argv[1])
except PermissionError:
    sys.exit("closed")
print(connection.recv(1000)[4:].decode())
"""
    command = [sys.executable, "-c", program, str(folder / "keeper.sock")]
    assert subprocess.run(command, capture_output=True, text=True, timeout=20).stderr.strip() == "closed"
    closed = [parent for parent in folder.parents if not parent.stat().st_mode & 0o001]  # as many as pytest has made
    opened = [folder, folder / "keeper.sock", *closed]
    modes = [path.stat().st_mode for path in opened]
    try:
        for path in opened:
            path.chmod(0o777)
        answered = subprocess.run(command, capture_output=True, text=True, timeout=20)
    finally:
        for path, mode in zip(opened, modes, strict=True):
            path.chmod(mode & 0o7777)
    assert "serves user 0, not 54321" in answered.stdout, answered.stderr
    assert client.status()["refused"] == 1
    assert client.status()["clients"] == 1


def raw(folder):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(folder / "keeper.sock"))
    return connection


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_what_is_no_request_is_answered_counted_and_costs_nothing(folder, client):
    keep(client, 1)
    before = resident_bytes(client.keeper_pid)
    count = 0
    for length in (MAX_BYTES + 1, 0xFFFFFFFF):
        with raw(folder) as connection:
            connection.sendall(struct.pack("!I", length) + b"x" * 100)
            answer, _ = receive(connection, 5)
            assert answer["error"] == "malformed"
            assert f"message of {length} bytes" in answer["message"]
            count += 1
    with raw(folder) as connection:
        for body in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b"{}", b'{"do": ["x"]}', b'{"do": "generations"}'):
            connection.sendall(struct.pack("!I", len(body)) + body)
            assert receive(connection, 5)[0]["error"] == "malformed", body
            count += 1
        send(connection, {"do": "hello", "job": "raw", "linger_s": 0, "protocol": 1})
        assert "error" not in receive(connection, 5)[0]
        wrong = [{"do": "begin", "shard": "s", "step": value, "bytes": 1} for value in (-1, 1.5, "1", None, True, 1 << 70)]
        wrong += [{"do": "reserve", "shard": value, "bytes": 1} for value in ("", 5, None, "x" * 1001)]
        wrong += [{"do": "seal", "shard": "s"}, {"do": "hello", "job": "raw", "linger_s": 0, "protocol": 1}]
        for request in wrong:
            send(connection, request)
            assert receive(connection, 5)[0]["error"] == "malformed", request
            count += 1
        send(connection, {"do": "seal", "shard": "s", "generation": 1, "data_bytes": 1, "draft_bytes": 1})
        assert receive(connection, 5)[0]["error"] == "refused"
    with raw(folder) as connection:
        send(connection, {"do": "hello", "job": "raw", "linger_s": 0, "protocol": 99})
        assert "speaks protocol 1" in receive(connection, 5)[0]["message"]
    with raw(folder) as connection:
        connection.sendall(b"\0\0")  # and goes
    assert client.status()["refused"] == count
    assert resident_bytes(client.keeper_pid) - before < 8 << 20
    assert eventually(lambda: client.status()["clients"] == 1)
    assert_is_state_of(client.load("rank0", 1)[0], 1, 1000)


def test_a_writer_that_leaves_no_manifest_gets_an_empty_slot(folder, client):
    with raw(folder) as connection:
        send(connection, {"do": "hello", "job": "job", "linger_s": 0, "protocol": 1})
        receive(connection, 5)
        send(connection, {"do": "begin", "shard": "s", "step": 1, "bytes": 10_000})
        answer, descriptors = receive(connection, 5)
        os.close(descriptors[0])
        seal = {"do": "seal", "shard": "s", "generation": answer["generation"], "data_bytes": 10, "draft_bytes": 10}
        send(connection, seal)
        assert receive(connection, 5)[0] == {}
        assert eventually(lambda: client.generations() == [])
    assert client.status()["refused"] == 1


def test_memory_that_is_not_there_is_not_taken(client):
    keep(client, 1)
    before = client.status()["jobs"]
    # Should the keeper take it all the same, this stops it before the kernel ends other processes for want of memory.
    resource.prlimit(client.keeper_pid, resource.RLIMIT_FSIZE, (1 << 28, 1 << 28))
    with pytest.raises(TooLittleMemoryError, match=r"2 slots of \d+ bytes need \d+ bytes more, and \d+ are available") as caught:
        client.reserve("rank1", 1 << 50)
    assert caught.value.needed_bytes >= 2 << 50
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    assert 0 < caught.value.available_bytes < free
    assert client.status()["jobs"] == before
    keep(client, 2)
    assert held(client) == [("rank0", 1, "committed"), ("rank0", 2, "committed")]


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("", {}, 950_000),
        ("0::/user/job", {"user/job/memory.max": "max", "user/job/memory.current": "5"}, 950_000),
        ("0::/user/job", {"user/memory.max": "700000", "user/memory.current": "100000"}, 570_000),
        (
            "0::/job",
            {"job/memory.max": "700000", "job/memory.current": "600000", "job/memory.stat": "anon 1\ninactive_file 100000"},
            190_000,
        ),
        ("4:cpu,memory:/a", {"memory/memory.limit_in_bytes": "400000", "memory/memory.usage_in_bytes": "100000"}, 285_000),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "1000", "memory/a/memory.usage_in_bytes": "2000"}, 0),
    ],
)
def test_available_memory_obeys_the_control_groups(tmp_path, lines, files, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable:    1000 kB\n".replace("1000 kB", "976 kB"))
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    found = available_bytes(tmp_path / "proc", tmp_path / "groups")
    assert found == (int(976 * 1024 * 0.95) if expected == 950_000 else expected)


# Where it is


def test_the_folder_has_to_be_private(tmp_path, monkeypatch):
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o750)
    with pytest.raises(InputError, match=r"others may enter .*open; run chmod 700"):
        KeeperClient("job", folder=open_folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        private_folder(file)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        private_folder(tmp_path / "link")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert private_folder() == tmp_path / "lightning-plugins"
    assert private_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert private_folder() == tmp_path / f"lightning-plugins-{os.geteuid()}"


@needs_root
def test_another_users_folder_is_refused(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o700)
    os.chown(folder, 54321, 54321)
    with pytest.raises(InputError, match="belongs to user 54321, not 0"):
        KeeperClient("job", folder=folder)


def test_values_that_make_no_sense_are_refused(folder, monkeypatch):
    with pytest.raises(InputError, match="linger_s 0 or more, got 'job' and -1"):
        KeeperClient("job", linger_s=-1, folder=folder)
    with pytest.raises(InputError, match="job must be a name"):
        KeeperClient("", folder=folder)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(InputError, match="need Linux"):
        KeeperClient("job", folder=folder)


# How it begins and ends


def join_at_once(rank, world_size, folder):
    with KeeperClient("job", folder=folder) as client:
        assert eventually(lambda: client.status()["clients"] == world_size, 20)
        rest = Path(folder) / f"{rank}"
        rest.write_text("")  # nobody leaves before all have come
        assert eventually(lambda: len(list(Path(folder).glob("[0-9]"))) == world_size, 20)
        return client.keeper_pid


def test_clients_that_start_at_once_get_one_keeper(folder, ranks):
    assert len(set(ranks.run(join_at_once, 4, str(folder), init=False))) == 1
    for path in folder.glob("[0-9]"):
        path.unlink()


def test_what_a_killed_keeper_leaves_stops_nobody(folder):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(folder / "keeper.sock"))
    stale.close()
    (folder / "keeper.lock").write_text("")
    with KeeperClient("job", folder=folder) as client:
        assert alive(client.keeper_pid)


def test_a_folder_with_a_very_long_name(tmp_path):
    deep = tmp_path / ("x" * 120)
    with KeeperClient("job", folder=deep) as client:
        keep(client, 1)
        client.end()
    assert eventually(lambda: list(deep.iterdir()) == [])


def test_a_lost_keeper_is_an_error_and_the_next_client_gets_a_new_one(folder):
    with KeeperClient("job", folder=folder) as client:
        keep(client, 1)
        writing = client.begin("rank0", pack(state_of(2, 1000)), 2, {})
        os.kill(client.keeper_pid, signal.SIGKILL)
        start_s = time.monotonic()
        writing.copy()  # the memory is still there for us; it belongs to nobody else
        for deed in (writing.seal, client.generations, lambda: client.load("rank0", 1), client.end):
            with pytest.raises(KeeperLostError, match=r"the (connection|keeper) of job 'job'"):
                deed()
        assert time.monotonic() - start_s < 1.0
        with KeeperClient("job", folder=folder) as successor:
            assert successor.keeper_pid != client.keeper_pid
            assert successor.generations() == []
            keep(successor, 1)
            successor.end()


def test_who_may_start_none_starts_none_even_next_to_one_that_is_dying(folder):
    with pytest.raises(KeeperLostError, match="there is no keeper in"):
        KeeperClient("job", folder=folder, start=False)
    assert list(folder.iterdir()) == []
    # A killed keeper's socket takes connections until the last of its threads has gone.
    with keeper_folder.listen(folder) as listener:

        def die():
            connection, _ = listener.accept()
            listener.close()
            connection.close()

        dying = threading.Thread(target=die)
        dying.start()
        with pytest.raises(KeeperLostError, match="there is no keeper in"):
            KeeperClient("job", folder=folder, start=False)
        dying.join()
    assert [path.name for path in folder.iterdir()] == ["keeper.sock"]
    (folder / "keeper.sock").unlink()


def test_a_keeper_that_cannot_start_says_why(folder, monkeypatch):
    monkeypatch.setattr(keeper_folder, "_MODULE", "lightning_plugins.engines.resilience.no_keeper")
    with pytest.raises(KeeperError, match=r"could not be started .*exit code 1.*No module named"):
        KeeperClient("job", folder=folder)
    (folder / "keeper.log").unlink()
    (folder / "keeper.lock").unlink()


def test_thirty_starts_and_ends_leave_nothing(folder):
    def held_here():
        """Count open descriptors and mapped slots, once what earlier tests have dropped is gone."""
        gc.collect()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("lightning-plugins-slot")

    with KeeperClient("warm", folder=folder) as client:
        keep(client, 0)
        client.end()
    before, pids = held_here(), set()
    for step in range(30):
        with KeeperClient("job", folder=folder) as client:
            keep(client, step)
            assert client.load("rank0", step)[1] == {"of": step}
            pids.add(client.keeper_pid)
            client.end()
    assert all(now <= then for now, then in zip(held_here(), before, strict=True))
    assert eventually(lambda: not any(alive(pid) for pid in pids))
    assert list(folder.iterdir()) == []
    assert not [name for name in os.listdir("/dev/shm") if "lightning" in name]


def test_it_lingers_as_long_as_it_was_told(folder):
    with KeeperClient("job", linger_s=0.5, folder=folder) as client:
        keep(client, 1)
    pid = client.keeper_pid
    with KeeperClient("job", linger_s=0.5, folder=folder) as client:
        time.sleep(0.7)
        assert held(client) == [("rank0", 1, "committed")]  # the time runs only while nobody is there
    assert client.keeper_pid == pid
    assert alive(pid)
    assert eventually(lambda: not alive(pid))
    assert list(folder.iterdir()) == []


def test_a_job_that_ends_takes_only_its_own_memory(folder, client):
    keep(client, 1)
    with KeeperClient("second", folder=folder) as other:
        keep(other, 5)
        client.end()
        assert client.generations() == []
        assert len(blocks_of(client.keeper_pid)) == 1
        assert_is_state_of(other.load("rank0", 5)[0], 5, 1000)
        keep(client, 9)  # and may begin anew
        other.end()
    assert held(client) == [("rank0", 9, "committed")]


def test_it_has_a_session_of_its_own_and_no_place_in_the_file_system(client):
    fields = Path(f"/proc/{client.keeper_pid}/stat").read_text().rpartition(")")[2].split()
    parent, _, session = (int(field) for field in fields[1:4])
    assert session != os.getsid(0)
    assert parent != os.getpid()
    assert os.readlink(f"/proc/{client.keeper_pid}/cwd") == "/"
    assert keeper_of(client.folder) == client.keeper_pid
