"""One thread that does jobs in the order in which they came, so that every rank issues its collectives in the same order.

Callbacks of futures run on whichever thread of gloo is free: two buckets could overtake each other on one rank and not on
another.
"""

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch


class Worker:
    """A thread of its own, started with the first job.

    Args:
        device: of the tensors; on a GPU jobs run on a stream of their own, behind what the submitting stream has queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job, which must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sparse-allreduce", daemon=True)
            self._thread.start()
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
            self._jobs.put(lambda: (self._stream.wait_event(ready), job())[1])  # type: ignore[union-attr,func-returns-value]
        else:
            self._jobs.put(job)

    def close(self) -> None:
        """End the thread after the jobs that are queued; one that waits for a lost rank ends with the process."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=1.0)
            self._thread = None

    def _run(self) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            while (job := self._jobs.get()) is not None:
                job()
