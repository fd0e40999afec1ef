"""A step becomes the job's when all ranks have it whole, and until then every rank can go back to the one before.

Each rank's keeper seals a step by itself. A thread then counts it in a store that all ranks reach; the rank that completes the
count turns the step's word from nothing to ``committed``, by compare-and-set. A rank that has to overwrite the step's slot first,
since its next capture is due, tries to turn the same word to ``abandoned``. One of the two wins, for all ranks alike: so no rank
overwrites what others hold for committed, and at every moment there is a step that all ranks have.
"""

import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store, TCPStore

from lightning_plugins._support.failpoints import failpoint
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, Writing

COMMITTED, ABANDONED = "committed", "abandoned"
SEAL_S = 600.0  # for the checksums of one step
_POLL_S = 0.005


class JobCommit:
    """Commits captured steps behind the training's back, one after the other.

    Args:
        client: of this rank.
        shards: what this rank captures at each step.
        store: reached by all ranks, without anything of an earlier start in it; None for a single rank.
        ranks: their number.

    Attributes:
        shards: what this rank captures at each step.
        committed: newest step that is the job's, as far as this rank knows; -1 before the first.
        abandoned: steps that some rank was too late for.
        copied: set while nothing waits to be copied.
    """

    def __init__(self, client: KeeperClient, shards: Sequence[str], store: Store | None, ranks: int) -> None:
        self.committed = -1
        self.abandoned = 0
        self.shards = list(shards)
        self._client, self._store, self._ranks = client, store, ranks
        self.copied = threading.Event()
        self.copied.set()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._error: BaseException | None = None

    def follow(self, step: int, unfinished: Writing | None = None) -> None:
        """Commit a step as soon as all ranks have sealed it; the one before must be settled.

        Args:
            step: of which the shards have been sealed, but for one.
            unfinished: that one, to be copied and sealed first.
        """
        assert self._thread is None
        self._hurry.clear()
        self.copied.clear()
        self._thread = threading.Thread(target=self._run, args=(step, unfinished), name="lightning_plugins-commit", daemon=True)
        self._thread.start()

    def settle(self, patient_s: float = 0.0) -> None:
        """Return when the last step is either committed or abandoned; checksums are waited for in any case.

        Args:
            patient_s: how long other ranks are waited for before the step is abandoned.

        Raises:
            KeeperError: if the keeper has been lost.
            RuntimeError: of the store, if it has gone with its rank.
        """
        if self._thread is not None:
            self._thread.join(patient_s)
            self._hurry.set()
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, step: int, unfinished: Writing | None) -> None:
        try:
            if unfinished is not None:
                unfinished.copy()
                self.copied.set()
                unfinished.seal()
            for shard in self.shards:
                self._client.wait_sealed(shard, step, SEAL_S)
            failpoint("resilience/commit/sealed")
            if self._decide(step) == COMMITTED:
                failpoint("resilience/commit/decided")
                self._client.commit(self.shards[0], step)
                self.committed = step
            else:
                self.abandoned += 1
        except BaseException as error:  # raised again where the training can see it
            self._error = error
        finally:
            self.copied.set()

    def _decide(self, step: int) -> str:
        """Return what all ranks agree on."""
        if self._store is None:
            return COMMITTED
        word = f"word/{step}"
        if self._store.add(f"sealed/{step}", 1) == self._ranks:
            return self._turn(word, COMMITTED)
        while not self._hurry.is_set():
            if self._store.check([word]):
                return self._turn(word, COMMITTED)
            time.sleep(_POLL_S)
        return self._turn(word, ABANDONED)

    def _turn(self, word: str, wanted: str) -> str:
        assert self._store is not None
        return bytes(self._store.compare_set(word, "", wanted)).decode()


def make_store(rank: int, ranks: int, address: str, port: int | None = None) -> TCPStore:
    """Return a store of this start of the job; rank 0 is its server, the others are given its ``port``.

    Args:
        rank: of this process.
        ranks: their number.
        address: of rank 0, on the network of the process group.
        port: of rank 0's store; None makes one.
    """
    return TCPStore(address, port or 0, None, rank == 0, timedelta(seconds=60), wait_for_workers=False)
