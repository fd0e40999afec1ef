"""States in memory that outlive the trainer, as a callback: ``Trainer(callbacks=[MemoryCheckpoint()])``.

Order of a capture: between two iterations of the training loop the state is copied into memory that another process holds (the
keeper); that process computes checksums; when all ranks are that far the step is committed. The next ``fit`` of the same job that
begins, after a crash, goes on from the newest step that all ranks can obtain, with the same bits.
"""

import logging
import os
import time
from contextlib import suppress
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch._C._distributed_c10d import Store
from torch.optim import Optimizer

from lightning_plugins._lightning import Callback, LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint import job as jobs
from lightning_plugins.callbacks.memory_checkpoint._seams import OpenedLoop, refuse_loaders
from lightning_plugins.callbacks.memory_checkpoint.shards import SHARED, join, own_shard, split
from lightning_plugins.callbacks.memory_checkpoint.stopping import EXIT_CODE, StopSignal
from lightning_plugins.engines.resilience.agreement import common_steps, everywhere
from lightning_plugins.engines.resilience.commit import JobCommit, make_store
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, TooLittleMemoryError
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.slots import DamagedError
from lightning_plugins.engines.resilience.state_tree import check_loads, pack

PATIENT_S = 10.0  # for the other ranks' last capture, when all stop

log = logging.getLogger(__name__)


class MemoryCheckpoint(Callback):
    """Capture the whole training state in memory outside of the trainer, and go on from it after a crash, with the same bits.

    A state has what Lightning saves, and what it does not: every rank's random generators, the place in the epoch, metrics that
    are gathering, buffers that are not persistent. Nothing is drawn or replaced by watching: a run with this callback computes
    what it computes without it. Data loaders with a ``state_dict`` go on by it; of others the batches that the epoch has seen are
    fetched once more.

    At SIGTERM all ranks stop after the same step, capture, and exit with code 143.

    It is made for one device and for DDP on one host. Under ``memory_checkpoint/`` it logs ``blocked_ms`` (of the last capture),
    ``captured_mb`` and ``committed_step``.

    Args:
        job: name of the run; left out, a hash of the script's path and ``default_root_dir``.
        every_n_steps: optimizer steps between two captures.
        lazy: copy parameters and optimizer state while the next forward and backward pass run, and have the optimizer wait for
            the rest of the copy; for modules whose parameters nothing but an optimizer changes.
        resume: ``"auto"`` goes on from a state of the same job, module, parameters and number of ranks, and starts afresh where
            there is none; ``True`` refuses to start afresh where there is one that does not fit; ``False`` always starts afresh.
        linger_s: how long the memory outlives the last trainer of a job that did not end cleanly.

    Raises:
        InputError: for values out of range; before training, for data, strategies and hosts that it is not made for; at the first
            capture, for a state with values that a safe loader would not load, by name.
    """

    def __init__(
        self,
        *,
        job: str | None = None,
        every_n_steps: int = 10,
        lazy: bool = False,
        resume: bool | str = "auto",
        linger_s: float = 300.0,
    ) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise InputError(f"every_n_steps must be 1 step or more, got {every_n_steps}; 10 loses at most ten steps")
        if resume not in ("auto", True, False):
            raise InputError(f"resume must be 'auto', True or False, got {resume!r}; 'auto' goes on from a state that fits")
        if not 0 < linger_s < float("inf"):
            raise InputError(f"linger_s must be above 0 seconds, got {linger_s}; 300 outlives a restart")
        self.job, self.every_n_steps, self.lazy, self.resume, self.linger_s = job, every_n_steps, lazy, resume, linger_s
        self._loop: OpenedLoop | None = None
        self._client: KeeperClient | None = None
        self._commit: JobCommit | None = None
        self._job = ""
        self._store: Store | None = None
        self._stop: StopSignal | None = None
        self._meta: dict[str, Any] = {}
        self._last_step = self._captured_step = 0
        self._numbers: dict[str, float] = {}
        self._checked = False
        self._rank_state: Any = None

    def __repr__(self) -> str:
        return (
            f"MemoryCheckpoint(job={self.job!r}, every_n_steps={self.every_n_steps}, lazy={self.lazy}, "
            f"resume={self.resume!r}, linger_s={self.linger_s:g})"
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the keeper and what it holds of this job, and let ``fit`` go on from it."""
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        refuse_strategy(trainer)
        job = trainer.strategy.broadcast(self.job or jobs.default_job(trainer.default_root_dir))
        fit = jobs.next_fit(job)
        self._job, self._store = f"{job}/{fit}", _store(trainer)
        self._connect(trainer)
        self._meta = {**jobs.fingerprint(pl_module), "world_size": trainer.world_size}
        self._loop = OpenedLoop(trainer, lambda: self._between_iterations(trainer))
        self._checked = False
        state = self._find(trainer)
        if state is not None:
            self._rank_state = state.pop("rank_state", None)
            self._loop.resume(state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step back where the user has named a checkpoint."""
        if self._loop is not None and trainer.ckpt_path is not None and self._loop.give_up():
            rank_zero_warn(f"left aside what memory held of this job: fit was given ckpt_path={str(trainer.ckpt_path)!r}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that cannot be put back, before the first batch."""
        if self._loop is not None:
            refuse_loaders(trainer)
            self._last_step = self._captured_step = trainer.global_step
            if self._rank_state is not None:
                trainer.strategy.load_rank_state_dict(self._rank_state)  # type: ignore[attr-defined]
                self._rank_state = None
            self._stop = StopSignal(self._store)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what the captures since the last batch took."""
        for name, value in self._numbers.items():
            pl_module.log(f"memory_checkpoint/{name}", value)
        self._numbers = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the memory back: this fit needs no going on any more."""
        if self._commit is not None:
            trainer.strategy.barrier("MemoryCheckpoint.on_fit_end")
            with suppress(KeeperError, RuntimeError, OSError):
                self._commit.settle()
            trainer.strategy.barrier("MemoryCheckpoint.on_fit_end, settled")
            with suppress(KeeperError):
                if trainer.local_rank == 0 and self._client is not None:
                    self._client.end()
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave; the memory stays for the next start."""
        self._leave()

    def _connect(self, trainer: Trainer) -> None:
        """Join the keeper of this host, or start one."""
        self._client = KeeperClient(self._job, linger_s=self.linger_s)
        shards = [own_shard(trainer.global_rank), *([SHARED] if trainer.local_rank == 0 else [])]
        self._commit = JobCommit(self._client, shards, self._store, trainer.world_size)

    def _find(self, trainer: Trainer) -> dict[str, Any] | None:
        """Return the newest state that all ranks can obtain, whole, or None."""
        assert self._client is not None
        needed = (SHARED, own_shard(trainer.global_rank))
        generations = [one for one in self._client.generations() if one.shard in needed and one.state != "writing"]
        fitting = [one for one in generations if self._fits(one.meta)]
        if generations and not fitting and self.resume is True:
            raise InputError(f"resume=True, and {self._misfit(generations[0].meta)}; resume='auto' starts afresh")
        if generations and not fitting:
            rank_zero_warn(f"starting afresh: {self._misfit(generations[0].meta)}")
        held = [{one.step for one in fitting if one.shard == shard} for shard in needed]
        for step in common_steps(sorted(set.intersection(*held)) if self.resume is not False else []):
            state = self._load(needed, step)
            if everywhere(state is not None):
                rank_zero_info(f"going on from step {step}, from the memory of this host")
                self._forget(generations, {step})
                return state
        self._forget(generations, set())
        return None

    def _load(self, shards: tuple[str, str], step: int) -> dict[str, Any] | None:
        assert self._client is not None
        try:
            return join(*(self._client.load(shard, step)[0] for shard in shards))
        except (DamagedError, KeeperError) as error:
            log.warning("step %d cannot be used: %s", step, error)
            return None

    def _forget(self, generations: list[Any], kept: set[int]) -> None:
        """Drop other steps of this rank's shards: the run does not go on from them."""
        assert self._client is not None
        assert self._commit is not None
        for one in generations:
            if one.step not in kept and one.shard in self._commit.shards:
                self._client.discard(one.shard, one.step)

    def _fits(self, meta: dict[str, Any]) -> bool:
        return all(meta.get(name) == value for name, value in self._meta.items())

    def _misfit(self, meta: dict[str, Any]) -> str:
        if meta.get("world_size") != self._meta["world_size"]:
            return f"memory holds a state of {meta.get('world_size')} ranks, and there are {self._meta['world_size']}"
        return f"memory holds a state of {meta.get('module')} with other parameters than this {self._meta['module']}"

    def _between_iterations(self, trainer: Trainer) -> None:
        """Capture or stop, if the last iteration took an optimizer step, so that no gradients wait."""
        step, before, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        if self._commit is None or step == before:
            return
        stop = self._stop is not None and self._stop.due(step)
        if stop or step // self.every_n_steps != self._captured_step // self.every_n_steps:
            self._captured_step = step
            self._settle_and_capture(trainer, step)
        if stop:
            if self._commit is not None:
                self._commit.settle(PATIENT_S)
            if self._stop is not None:
                self._stop.leave(trainer.global_rank, trainer.world_size, PATIENT_S)
            rank_zero_warn(f"SIGTERM: stopped after step {step}, whose state is in memory; exit code {EXIT_CODE}")
            raise SystemExit(EXIT_CODE)

    def _settle_and_capture(self, trainer: Trainer, step: int) -> None:
        """Capture a step once the one before is final. What goes wrong with memory or store costs captures, not the training."""
        assert self._commit is not None
        start_s = time.perf_counter()
        try:
            self._commit.settle()
        except KeeperError as error:
            log.warning("%s; MemoryCheckpoint goes on with a new one", error)
            self._connect(trainer)
        except (RuntimeError, OSError, TimeoutError) as error:
            log.warning("MemoryCheckpoint captures no more in this run, since ranks cannot agree any more: %s", error)
            self._leave()
            return
        state = self._take(trainer)
        try:
            self._capture(trainer, step, state)
        except KeeperError as error:
            log.warning("%s; MemoryCheckpoint goes on with a new one", error)
            self._connect(trainer)
        except TooLittleMemoryError as error:
            log.warning("MemoryCheckpoint captures no more in this run: %s", error)
            self._leave()
        self._numbers["blocked_ms"] = 1e3 * (time.perf_counter() - start_s)

    def _take(self, trainer: Trainer) -> dict[str, Any]:
        assert self._loop is not None
        state = self._loop.take()
        if hasattr(trainer.strategy, "rank_state_dict"):
            state["rank_state"] = trainer.strategy.rank_state_dict()
        if not self._checked:
            check_loads(state)
            self._checked = True
        return state

    def _capture(self, trainer: Trainer, step: int, state: dict[str, Any]) -> None:
        """Copy what this rank captures, at once or behind the next forward and backward pass, and have it committed then."""
        assert self._commit is not None
        assert self._client is not None
        shared, own = split(state, {name for name, _ in trainer.lightning_module.named_parameters()})
        parts = {own_shard(trainer.global_rank): own, SHARED: shared}
        begun = {shard: self._client.begin(shard, pack(parts[shard]), step, self._meta) for shard in self._commit.shards}
        # Until the next optimizer step parameters and what optimizers keep stay as they are; all else may change at once.
        later = begun.pop(SHARED, None) if self.lazy else None
        for writing in begun.values():
            writing.copy()
            writing.seal()
        self._commit.follow(step, later)
        self._numbers = {
            "captured_mb": 1e-6 * sum(one.bytes for one in (*begun.values(), *([later] if later else []))),
            "committed_step": float(self._commit.committed),
        }

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Wait until what the optimizer changes has been copied."""
        if self.lazy and self._commit is not None:
            start_s = time.perf_counter()
            self._commit.copied.wait()
            if "blocked_ms" in self._numbers:
                self._numbers["blocked_ms"] += 1e3 * (time.perf_counter() - start_s)

    def _leave(self) -> None:
        if self._loop is not None:
            self._loop.close()
        if self._stop is not None:
            self._stop.close()
        if self._client is not None:
            self._client.close()
        self._loop = self._stop = self._client = self._commit = self._store = None


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse what this callback is not made for, by name.

    Raises:
        InputError: for a strategy whose ranks hold parts of the model, and for several hosts.
    """
    strategies = submodule("strategies")
    strategy = trainer.strategy
    if type(strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        raise InputError(
            f"MemoryCheckpoint is made for one device and for DDP, got {type(strategy).__name__}, whose ranks hold parts of the "
            "model; use ModelCheckpoint there"
        )
    if not isinstance(strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy):
        raise InputError(
            f"MemoryCheckpoint is made for one device and for DDP, got {type(strategy).__name__}; use ModelCheckpoint"
        )
    if trainer.num_nodes > 1:
        raise InputError(f"MemoryCheckpoint has no copies on other hosts yet, got num_nodes={trainer.num_nodes}; use one host")


def _store(trainer: Trainer) -> Store | None:
    """Return a store of this start, whose port rank 0 tells the others."""
    if trainer.world_size == 1:
        return None
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if trainer.global_rank == 0:
        store = make_store(0, trainer.world_size, address)
        trainer.strategy.broadcast(store.port)
        return store
    return make_store(trainer.global_rank, trainer.world_size, address, trainer.strategy.broadcast(None))
