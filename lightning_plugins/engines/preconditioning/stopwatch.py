"""How long tasks take, without making the host wait: clock readings on a CPU, events of the stream on a GPU."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of named tasks.

    Args:
        device: that the tasks' tensors are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, task: str) -> Iterator[None]:
        """Time the block under the name of a task; tasks may contain each other."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds[task] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._events.append((task, begin, end))

    def read_ms(self) -> dict[str, float]:
        """Return milliseconds by task since the last call, and start anew; on a GPU this waits for the last task."""
        for task, begin, end in self._events:
            end.synchronize()
            self._seconds[task] += begin.elapsed_time(end) / 1000.0
        read = {task: seconds * 1000.0 for task, seconds in self._seconds.items()}
        self._seconds.clear()
        self._events.clear()
        return read
