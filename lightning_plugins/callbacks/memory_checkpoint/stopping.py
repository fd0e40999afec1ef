"""SIGTERM without a collective in its handler: a flag, a step at which all ranks stop, and an exit code that is no success.

Lightning's own handler broadcasts from inside the signal; ranks that are signalled at different points of a step wait for each
other there until the group's timeout. Here the handler sets a flag and nothing else. Between two iterations a rank that was
signalled names the step after the next in the store, and every rank looks there after each of its steps: since gradients are
summed over all ranks, none can be two steps ahead.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from torch.distributed import Store

AHEAD = 2  # steps
EXIT_CODE = 128 + signal.SIGTERM
_WORD, _LEAVING = "stop", "leaving"


class StopSignal:
    """Takes SIGTERM over until ``close``.

    Args:
        store: reached by all ranks; None for a single one.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._received = False
        self._before: Any = None
        self._installed = threading.current_thread() is threading.main_thread()  # Python lets no other thread do it
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def close(self) -> None:
        """Put the handler of before back."""
        if self._installed:
            self._installed = False
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def due(self, step: int) -> bool:
        """Return whether all ranks stop after this optimizer step; to be asked after each one."""
        if self._store is None:
            return self._received
        if self._received:
            self._store.compare_set(_WORD, "", str(step + AHEAD))
        return self._store.check([_WORD]) and step >= int(self._store.get(_WORD))

    def leave(self, rank: int, ranks: int, patient_s: float) -> None:
        """Return when this rank may go: the one that serves the store is the last."""
        if self._store is None:
            return
        deadline = time.monotonic() + patient_s
        arrived = self._store.add(_LEAVING, 1)
        while rank == 0 and arrived < ranks and time.monotonic() < deadline:
            time.sleep(0.01)
            arrived = self._store.add(_LEAVING, 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
