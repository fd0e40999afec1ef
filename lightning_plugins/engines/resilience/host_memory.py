"""How much memory this host can still give: the kernel's estimate and the limits of the control groups around this process."""

import os
from pathlib import Path

KEPT_FREE = 0.05  # of what is available: the trainer goes on allocating while slots are made


def available_bytes(proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that may be taken: the smallest of MemAvailable and what each limit leaves, less a twentieth.

    Args:
        proc: where the kernel describes processes.
        control_groups: where it shows control groups, of version 1 or 2.
    """
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    left = [int(fields["MemAvailable"].split()[0]) * 1024]
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _left_below(control_groups, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            left += _left_below(control_groups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return int(max(0, min(left)) * (1 - KEPT_FREE))


def _left_below(mount: Path, path: str, limit_name: str, used_name: str) -> list[int]:
    """Return what the limits of a group and of those around it leave; in a container some of the path may not be visible."""
    left = []
    group = os.path.normpath(path.strip("/"))
    while True:
        folder = mount / group
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            if limit != "max":
                # Pages of files count as used, and are given back when somebody asks.
                left.append(int(limit) - used + _reclaimable_bytes(folder))
        except OSError:
            pass
        if group in (".", ""):
            return left
        group = os.path.dirname(group)


def _reclaimable_bytes(folder: Path) -> int:
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
