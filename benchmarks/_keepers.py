"""The processes of MemoryCheckpoint that outlive a trainer, and how a benchmark ends its own."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTS = ("lightning_plugins.engines.resilience.keeper", "lightning_plugins.engines.resilience.disk_writer")
AT_MOST_S = 5.0


def keepers(runtime: Path) -> list[int]:
    """Return the keeper and the disk writers that meet in a folder; they are nobody's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes()
            if str(runtime).encode() in line and any(part.encode() in line.split(b"\0") for part in PARTS):
                found.append(int(path.parent.name))
    return found


def kill(pids: list[int]) -> None:
    """SIGKILL processes that this benchmark has started."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def end_keepers(runtime: Path) -> None:
    """End those that wait for a new start, which there is not."""
    kill(keepers(runtime))
    wait_until(lambda: not keepers(runtime))


def wait_until(is_so: Callable[[], bool]) -> None:
    """Return when it is so, or after some seconds."""
    deadline = time.monotonic() + AT_MOST_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
