"""Namespaces as hosts: bytes counted against the ring's closed form, time against bandwidth, cables cut, nothing left."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import hosts as network
from tests.ranks import linux
from tests.ranks.hosts import NAMESPACES, Hosts
from tests.ranks.rank import progress

pytestmark = pytest.mark.netns


def where_am_i(rank, world_size):
    names = {os.stat(NAMESPACES / name).st_ino: name for name in os.listdir(NAMESPACES)}
    dist.barrier()
    namespace = names[os.stat("/proc/self/ns/net").st_ino]
    return namespace, os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_RANK"]


def test_ranks_are_where_they_were_placed(ranks, hosts):
    pair = hosts(2)
    first, second = (host.name for host in pair.hosts)
    assert ranks.run(where_am_i, 3, hosts=pair.place(0, 1, 1)) == [
        (first, "0", "1", "0"),
        (second, "0", "2", "1"),
        (second, "1", "2", "1"),
    ]


def reduce_between_barriers(rank, world_size, count):
    tensor = torch.full((count,), float(rank + 1))
    progress("ready")
    dist.barrier()
    started = time.monotonic()
    dist.all_reduce(tensor)
    seconds = time.monotonic() - started
    assert bool((tensor == world_size * (world_size + 1) / 2).all())
    return seconds


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_allreduce_sends_what_the_ring_must(ranks, hosts, world_size):
    """Each rank of a ring sends and receives 2 (P - 1) / P times the tensor.

    What comes on top, at most: a header of 66 bytes to every 1448 of the tensor (4.6 %), an acknowledgement of 66 bytes to every
    two segments received (2.3 %), and less than 1 % of set-up.
    """
    network = hosts(world_size)
    count = 1_000_000
    ranks.run(reduce_between_barriers, world_size, count, hosts=network.place(*range(world_size)))
    expected = 2 * (world_size - 1) / world_size * 4 * count
    for number in range(world_size):
        assert expected < network.bytes_sent(number) < 1.08 * expected
        assert expected < network.bytes_received(number) < 1.08 * expected


def test_ranks_on_one_host_send_nothing_outside(ranks, hosts):
    """They meet at the store on the switch, and reduce over the host's own loopback."""
    pair = hosts(2)
    ranks.run(reduce_between_barriers, 2, 1_000_000, hosts=pair.place(1, 1))
    assert pair.bytes_sent(0) == 0
    assert 0 < pair.bytes_sent(1) < 100_000


@pytest.mark.parametrize("bandwidth_bytes_per_s", [1.25e6, 12.5e6])
def test_a_shaped_link_takes_its_time(ranks, hosts, bandwidth_bytes_per_s):
    """With two ranks each link carries the tensor once in each direction, both at the same time."""
    pair = hosts(2, bandwidth_bytes_per_s=bandwidth_bytes_per_s)
    expected_s = 0.8
    count = int(bandwidth_bytes_per_s * expected_s / 4)
    for seconds in ranks.run(reduce_between_barriers, 2, count, hosts=pair.place(0, 1)):
        assert expected_s / 2 < seconds < expected_s * 2


def test_receiving_is_shaped_too(ranks, hosts):
    """Two hosts send to a third at once: its one link is the bottleneck, not their two."""
    three = hosts(3, bandwidth_bytes_per_s=2e6)
    expected_s = 0.8
    seconds = ranks.run(gather_at_zero, 3, int(2e6 * expected_s / 2 / 4), hosts=three.place(0, 1, 2))[0]
    assert expected_s / 2 < seconds < expected_s * 2
    assert seconds > 0.75 * expected_s  # half of it if only the senders' links were shaped


def gather_at_zero(rank, world_size, count):
    dist.barrier()
    started = time.monotonic()
    tensor = torch.ones(count)
    dist.gather(tensor, [torch.empty(count) for _ in range(world_size)] if rank == 0 else None)
    return time.monotonic() - started


def barriers_until_it_fails(rank, world_size):
    try:
        while True:
            dist.barrier()
            progress("alive")
            time.sleep(0.01)
    except RuntimeError as error:
        return str(error)


def test_a_cut_cable_is_noticed_at_the_timeout_and_not_by_a_reset(ranks, hosts):
    pair = hosts(2)
    with ranks.start(barriers_until_it_fails, 2, hosts=pair.place(0, 1), timeout_s=1.5) as handle:
        handle.wait_for("alive")
        cut_at = time.monotonic()
        pair.cut(1)
        assert handle.join(10) == [0, 0]
        assert 1.0 < time.monotonic() - cut_at < 4
        assert "Timed out" in handle.results()[0]


def test_a_healed_cable_goes_on(ranks, hosts):
    pair = hosts(2)
    with ranks.start(barriers_until_it_fails, 2, hosts=pair.place(0, 1)) as handle:
        handle.wait_for("alive")
        pair.cut(0)
        handle.exit_codes  # noqa: B018 (takes in what was sent before the cut)
        time.sleep(0.1)
        before = _count_alive(handle)
        time.sleep(0.2)
        assert _count_alive(handle) == before
        pair.heal(0)
        deadline = time.monotonic() + 10
        while _count_alive(handle) < before + 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _count_alive(handle) >= before + 20


def _count_alive(handle):
    assert handle.exit_codes == [None, None]
    return len(handle.messages)


def starts_a_daemon(rank, world_size):
    daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
    progress(daemon.pid)
    progress("ready")
    time.sleep(600)


def test_a_lost_host_loses_its_daemons_too(ranks, hosts):
    pair = hosts(2)
    with ranks.start(starts_a_daemon, 2, hosts=pair.place(0, 1), init=False) as handle:
        handle.wait_for("ready")
        daemons = {rank: value for rank, value, _ in handle.messages if value != "ready"}
        pair.lose(1)
        assert handle.join(10, ranks=[1]) == [None, -signal.SIGKILL]
        assert linux.state(daemons[0]) == "S"
        assert linux.state(daemons[1]) == ""


def test_nothing_is_left_after_a_failing_block():
    def fail():
        with Hosts(2) as pair:
            inside = subprocess.Popen(["ip", "netns", "exec", pair.hosts[0].name, "sleep", "600"], start_new_session=True)
            started.append(inside)
            time.sleep(0.3)  # until it is inside
            assert len(network.remaining(os.getpid())) == 3
            raise RuntimeError("a failing test")

    started = []
    with pytest.raises(RuntimeError, match="a failing test"):
        fail()
    assert network.remaining(os.getpid()) == []
    assert started[0].wait(5) == -signal.SIGKILL


def test_two_networks_at_once_do_not_meet(ranks, hosts):
    first, second = hosts(2), hosts(2)
    assert first.hosts[1].address == second.hosts[1].address
    ranks.run(reduce_between_barriers, 2, 1000, hosts=first.place(0, 1))
    assert second.bytes_received(1) == 0 < first.bytes_received(1)


def test_hosts_of_a_killed_run_are_removed_by_the_next():
    program = "import os, signal\nfrom tests.ranks.hosts import Hosts\nHosts(1)\nos.kill(os.getpid(), signal.SIGKILL)"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=root)
    assert killed.wait(20) == -signal.SIGKILL
    left = network.remaining(killed.pid)
    assert len(left) == 2
    with Hosts(1):
        assert network.remaining(killed.pid) == []
        assert len(network.remaining(os.getpid())) == 2


def test_living_owners_are_left_alone(hosts):
    hosts(1)
    assert network.remove_stale() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be 1 to 250, got 0"),
        ({"count": 251}, "count must be 1 to 250, got 251"),
        ({"count": 1, "bandwidth_bytes_per_s": 0}, "must be positive, got 0; None leaves"),
    ],
)
def test_bad_hosts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Hosts(**arguments)
