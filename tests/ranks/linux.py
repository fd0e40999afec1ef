"""What Linux offers for processes and Python's ``os`` does not: namespaces, reaping of orphans, who descends from whom."""

import ctypes
import os
import signal
from pathlib import Path

OWNER_VARIABLE = "LIGHTNING_PLUGINS_RANKS_OWNER"
NAMESPACES = Path("/var/run/netns")

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def enter_network_namespace(name: str) -> None:
    """Move the calling thread, and every thread it starts from now on, into a namespace made by ``ip netns add``."""
    descriptor = os.open(NAMESPACES / name, os.O_RDONLY)
    try:
        _check(_libc.setns(descriptor, _CLONE_NEWNET), f"setns to {name}")
    finally:
        os.close(descriptor)


def leave_mounts() -> None:
    """Give the calling process mounts of its own: what it mounts from now on nobody else sees."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent ends, however that happens."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, daemons included."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def state(pid: int) -> str:
    """Return the kernel's letter for a process (``R``, ``S``, ``D``, ``T`` stopped, ``Z`` zombie), or ``""`` if it is gone."""
    return _stat(pid)[0]


def _stat(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return "", 0
    return fields[0].decode(), int(fields[1])


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(pid: int) -> list[int]:
    """Return the children of ``pid``, their children, and so on."""
    children: dict[int, list[int]] = {}
    for other in _all_pids():
        children.setdefault(_stat(other)[1], []).append(other)
    found = [pid]
    for ancestor in found:
        found += children.get(ancestor, [])
    return found[1:]


def owned_by(pid: int) -> list[int]:
    """Return all processes that descend from a rank server of ``pid``, orphans and daemons included."""
    marker = f"{OWNER_VARIABLE}={pid}".encode()
    found = []
    for other in _all_pids():
        try:
            environment = Path(f"/proc/{other}/environ").read_bytes()
        except OSError:
            continue
        if marker in environment.split(b"\0") and other != pid and state(other) not in ("", "Z"):
            found.append(other)
    return found
