"""Network namespaces as hosts, joined by a switch: links with a bandwidth, that can be cut, and whose bytes are counted.

Each host is a namespace with the interface ``eth0``; its other end is a port of a bridge in one more namespace, the switch,
which has an address too. Nothing of it is in the machine's own network: no address can collide, and nothing outside is
reachable. A link is shaped by a token bucket (tc tbf) at both ends, so a host sends and receives at most its bandwidth.
There is no latency: the usual kernels of test machines lack netem, and tbf cannot delay; `tests.ranks.proxy` delays single
TCP connections.

Names are ``lp<pid of the test>-<count>-h<i>`` and ``...-sw``; what a killed earlier test left behind is removed by the next.
"""

import itertools
import json
import os
import select
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.ranks.linux import NAMESPACES

INTERFACE = "eth0"
PREFIX = "lp"
SWITCH_ADDRESS = "10.231.0.254"
MOST_HOSTS = 250
_BURST_BYTES = 64 * 1024  # the largest segment that the kernel hands to a link in one piece
_QUEUE_BYTES = 4 * 1024 * 1024  # a switch that drops would measure TCP's timers instead of the link

_count = itertools.count()


@dataclass(frozen=True)
class Host:
    """Where a rank is placed.

    Attributes:
        name: its network namespace.
        address: its IPv4 address.
        interface: the interface that has the address.
        switch: the network namespace that joins the hosts; stores and proxies stand there.
        switch_address: the switch's IPv4 address, which all hosts reach.
    """

    name: str
    address: str
    interface: str
    switch: str
    switch_address: str


class Hosts:
    """``count`` hosts on one switch, for the length of a ``with`` block.

    Args:
        count: number of hosts.
        bandwidth_bytes_per_s: of each link in each direction; None leaves it unshaped.

    Raises:
        ValueError: if ``count`` or the bandwidth is not positive.
        OSError: if the namespaces cannot be made (``why_not`` says so beforehand).
    """

    def __init__(self, count: int, bandwidth_bytes_per_s: float | None = None) -> None:
        if not 1 <= count <= MOST_HOSTS:
            raise ValueError(f"count must be 1 to {MOST_HOSTS}, got {count}")
        if bandwidth_bytes_per_s is not None and bandwidth_bytes_per_s <= 0:
            raise ValueError(
                f"bandwidth_bytes_per_s must be positive, got {bandwidth_bytes_per_s}; None leaves the links unshaped"
            )
        remove_stale()
        stem = f"{PREFIX}{os.getpid()}-{next(_count)}"
        self.switch = f"{stem}-sw"
        self.hosts = [Host(f"{stem}-h{i}", f"10.231.0.{i + 1}", INTERFACE, self.switch, SWITCH_ADDRESS) for i in range(count)]
        try:
            self._make(bandwidth_bytes_per_s)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def place(self, *numbers: int) -> list[Host]:
        """Return the host of each rank: ``place(0, 0, 1, 1)`` puts ranks 0 and 1 on host 0, and 2 and 3 on host 1."""
        return [self.hosts[number] for number in numbers]

    def cut(self, number: int) -> None:
        """Pull a host's cable: packets vanish in both directions and nobody is told."""
        _ip(f"link set port{number} down", self.switch)

    def heal(self, number: int) -> None:
        """Put the cable back."""
        _ip(f"link set port{number} up", self.switch)

    def lose(self, number: int) -> None:
        """Lose a host with all it holds: cut it, then SIGKILL every process in it, whatever started it."""
        self.cut(number)
        _kill_inside(self.hosts[number].name)

    def bytes_sent(self, number: int) -> int:
        """Return the bytes that a host's interface has sent, headers included.

        TCP's headers are counted once a segment of up to 64 KiB, as the kernel hands them to a virtual link.
        """
        return self._counters(number)["tx"]["bytes"]

    def bytes_received(self, number: int) -> int:
        """Return the bytes that a host's interface has received, counted likewise."""
        return self._counters(number)["rx"]["bytes"]

    def close(self) -> None:
        """Kill what still runs in the hosts and remove them."""
        _remove([host.name for host in self.hosts] + [self.switch])

    def _counters(self, number: int) -> dict[str, dict[str, int]]:
        output = _run(["ip", "-n", self.hosts[number].name, "-j", "-s", "link", "show", "dev", INTERFACE])
        counters: dict[str, dict[str, int]] = json.loads(output)[0]["stats64"]
        return counters

    def _make(self, bandwidth_bytes_per_s: float | None) -> None:
        _ip("\n".join(f"netns add {name}" for name in [self.switch, *(host.name for host in self.hosts)]))
        lines = [
            "link set lo up",
            "link add switch type bridge forward_delay 0 mcast_snooping 0",
            # Without an IPv6 address of its own an interface sends nothing that the test did not ask for.
            "link set switch addrgenmode none",
            f"addr add {SWITCH_ADDRESS}/24 dev switch",
            "link set switch up",
        ]
        for i, host in enumerate(self.hosts):
            lines.append(f"link add port{i} type veth peer name {INTERFACE} netns {host.name}")
            lines.append(f"link set port{i} addrgenmode none master switch up")
        _ip("\n".join(lines), self.switch)
        for i, host in enumerate(self.hosts):
            lines = [
                "link set lo up",
                f"link set {INTERFACE} addrgenmode none",
                f"addr add {host.address}/24 dev {INTERFACE}",
                f"link set {INTERFACE} up",
            ]
            _ip("\n".join(lines), host.name)
            if bandwidth_bytes_per_s is not None:
                _shape(host.name, INTERFACE, bandwidth_bytes_per_s)
                _shape(self.switch, f"port{i}", bandwidth_bytes_per_s)


def why_not() -> str:
    """Return why this machine cannot make network namespaces, or ``""`` if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Hosts(1, bandwidth_bytes_per_s=1e6):
            return ""
    except OSError as error:
        return f"network namespaces, bridges or shaped links cannot be made here: {error}"


def remaining(pid: int) -> list[str]:
    """Return the namespaces that the process ``pid`` has made and not removed."""
    return [name for name in _names() if name.startswith(f"{PREFIX}{pid}-")]


def remove_stale() -> list[str]:
    """Remove, and return, the namespaces whose owner is gone."""
    stale = []
    for name in _names():
        owner = name[len(PREFIX) :].partition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            stale.append(name)
    _remove(stale)
    return stale


def _names() -> list[str]:
    return sorted(os.listdir(NAMESPACES)) if NAMESPACES.is_dir() else []


def _remove(names: list[str]) -> None:
    for name in set(_names()) & set(names):
        try:
            _kill_inside(name)
            _run(["ip", "netns", "del", name])
        except OSError:
            if name in _names():  # else another session has removed the same stale one
                raise


def _kill_inside(name: str, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while pids := _run(["ip", "netns", "pids", name]).split():
        with ExitStack() as closing:
            dying = []
            for pid in pids:
                with suppress(ProcessLookupError):
                    dying.append(os.pidfd_open(int(pid)))
                    closing.callback(os.close, dying[-1])
                    signal.pidfd_send_signal(dying[-1], signal.SIGKILL)
            for process in dying:  # it leaves its namespace a moment before it is dead
                if not select.select([process], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise OSError(f"processes {', '.join(pids)} in {name} do not die")


def _shape(namespace: str, interface: str, bandwidth_bytes_per_s: float) -> None:
    # tc's "bps" are bytes a second. Above the burst the bucket also has to hold what flows between two clock ticks.
    burst_bytes = max(_BURST_BYTES, int(bandwidth_bytes_per_s / 250))
    rule = ["rate", f"{int(bandwidth_bytes_per_s)}bps", "burst", f"{burst_bytes}", "limit", f"{_QUEUE_BYTES}"]
    _run(["tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "tbf", *rule])


def _ip(lines: str, namespace: str | None = None) -> None:
    """Run one or several commands of ``ip``, in a namespace if one is named."""
    _run(["ip", *(["-n", namespace] if namespace else []), "-batch", "-"], lines + "\n")


def _run(command: list[str], lines: str | None = None) -> str:
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}{f' in: {lines}' if lines else ''}")
    return done.stdout
