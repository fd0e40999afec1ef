"""States in memory that outlive the trainer, as a callback: ``Trainer(callbacks=[MemoryCheckpoint()])``.

Order of a capture: between two iterations of the training loop the state is copied into memory that another process holds (the
keeper); that process computes checksums; when all ranks are that far the step is committed. The next ``fit`` of the same job that
begins, after a crash, goes on from the newest step that all ranks can obtain, with the same bits.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.distributed import Store
from torch.optim import Optimizer

from lightning_plugins._lightning import Callback, LightningModule, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint import job as jobs
from lightning_plugins.callbacks.memory_checkpoint._ddp_seams import GradientOrder, replay
from lightning_plugins.callbacks.memory_checkpoint._seams import OpenedLoop, refuse_loaders
from lightning_plugins.callbacks.memory_checkpoint._sharded_seams import is_sharded, layout, restore_pieces, take_pieces
from lightning_plugins.callbacks.memory_checkpoint.stopping import EXIT_CODE, StopSignal
from lightning_plugins.engines.resilience.commit import make_store
from lightning_plugins.engines.resilience.neighbours import interface_address
from lightning_plugins.engines.resilience.recovery import Memory
from lightning_plugins.engines.resilience.state_tree import check_loads
from lightning_plugins.engines.resilience.tiers import Place, Tiers

log = logging.getLogger(__name__)
PATIENT_S = 10.0  # for the other ranks' last capture, when all stop


class MemoryCheckpoint(Callback):
    """Capture the whole training state in memory outside of the trainer, and go on from it after a crash, with the same bits.

    A state has what Lightning saves, and what it does not: every rank's random generators, the place in the epoch, metrics that
    are gathering, buffers that are not persistent. Nothing is drawn or replaced by watching: a run with this callback computes
    what it computes without it. Data loaders with a ``state_dict`` go on by it, if no random numbers are lost by that; of others
    the batches that the epoch has seen are fetched once more.

    At SIGTERM all ranks stop after the same step, capture, and exit with code 143.

    On several hosts pairs of keepers hold each other's copies, if the job has a secret: the variable
    ``LIGHTNING_PLUGINS_JOB_SECRET_FILE`` names a file of mode 0600, the same on all hosts. What travels is authenticated, and not
    encrypted.

    It is made for one device, for DDP, and for ``ModelParallelStrategy`` (FSDP2), where each rank captures its own pieces. Under
    ``memory_checkpoint/`` it logs ``blocked_ms`` (of the last capture), ``captured_mb`` and ``committed_step``;
    ``memory_age_s``, ``neighbour_age_s`` and ``disk_age_s``, how old the newest state of each tier is by the time of the next
    capture; and once after a replay ``replay_s``, the seconds that it took.

    Args:
        job: name of the run; left out, a hash of the script's path and ``default_root_dir``.
        every_n_steps: optimizer steps between two captures.
        lazy: copy parameters and optimizer state while the next forward and backward pass run, and have the optimizer wait for
            the rest of the copy; for modules whose parameters nothing but an optimizer changes.
        disk_dir: folder of the states on disk; None is one under ``default_root_dir``, False is no disk tier. On several hosts it
            has to be on storage that all of them see; if it is not, nothing goes to disk, and a warning says so.
        disk_every_n_steps: optimizer steps between two captured states that go to disk; they are written by a process of its
            own, which survives the trainer, and the newest two are kept.
        resume: ``"auto"`` goes on from a state of the same job, module, parameters and number of ranks, and starts afresh where
            there is none; ``True`` refuses to start afresh where there is one that does not fit; ``False`` always starts afresh.
        replay: fetch once more the batches that the epoch has seen, where a loader's state is not enough to go on with the same
            random numbers. False is for data that draw none: they are left out in the sampler, and no sample of them is read;
            loaders with a ``state_dict`` all go on by it.
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
        disk_dir: str | Path | bool | None = None,
        disk_every_n_steps: int = 100,
        resume: bool | str = "auto",
        replay: bool = True,
        linger_s: float = 300.0,
    ) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise InputError(f"every_n_steps must be 1 step or more, got {every_n_steps}; 10 loses at most ten steps")
        if not isinstance(disk_every_n_steps, int) or disk_every_n_steps < 1:
            raise InputError(f"disk_every_n_steps must be 1 step or more, got {disk_every_n_steps}; 1 writes every captured step")
        if disk_dir is True or disk_dir == "":
            raise InputError(f"disk_dir must be a folder, False or None, got {disk_dir!r}; None makes one under default_root_dir")
        if resume not in ("auto", True, False):
            raise InputError(f"resume must be 'auto', True or False, got {resume!r}; 'auto' goes on from a state that fits")
        if not 0 < linger_s < float("inf"):
            raise InputError(f"linger_s must be above 0 seconds, got {linger_s}; 300 outlives a restart")
        self.job, self.every_n_steps, self.lazy, self.resume, self.replay = job, every_n_steps, lazy, resume, replay
        self.disk_dir, self.disk_every_n_steps, self.linger_s = disk_dir, disk_every_n_steps, linger_s
        self._loop: OpenedLoop | None = None
        self._tiers: Tiers | None = None
        self._store: Store | None = None
        self._stop: StopSignal | None = None
        self._order: GradientOrder | None = None
        self._gradient_order: list[str] = []
        self._last_step = self._captured_step = 0
        self._numbers: dict[str, float] = {}
        self._checked = False
        self._rank_state: Any = None

    def __repr__(self) -> str:
        return (
            f"MemoryCheckpoint(job={self.job!r}, every_n_steps={self.every_n_steps}, lazy={self.lazy}, "
            f"disk_dir={self.disk_dir!r}, disk_every_n_steps={self.disk_every_n_steps}, "
            f"resume={self.resume!r}, replay={self.replay}, linger_s={self.linger_s:g})"
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what memory and disk hold of this job, and let ``fit`` go on from it."""
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        refuse_strategy(trainer)
        if not is_sharded(trainer):
            self._open(trainer, pl_module, {"world_size": trainer.world_size})
        elif self.lazy:
            rank_zero_warn("lazy=True has no effect with ModelParallelStrategy: every rank copies its pieces at once")

    def _open(self, trainer: Trainer, pl_module: LightningModule, place_meta: dict[str, Any]) -> dict[str, Any] | None:
        """Connect the tiers; return the state that they hold of this job, which the loop goes on from."""
        job = trainer.strategy.broadcast(self.job or jobs.default_job(trainer.default_root_dir))
        fit = jobs.next_fit(job)
        meta = {**jobs.fingerprint(pl_module), **place_meta}
        place = Place(
            trainer.global_rank, trainer.local_rank, trainer.world_size, trainer.node_rank, trainer.num_nodes, _rank_0_address()
        )
        self._store = _store(trainer)
        folder = self._folder(trainer, job, fit)
        self._tiers = Tiers(f"{job}/{fit}", meta, place, self._store, self.linger_s, folder, self.disk_every_n_steps)
        self._loop = OpenedLoop(trainer, lambda: self._between_iterations(trainer), self.replay)
        self._checked = False
        found = self._tiers.find(self.resume)
        if found is None:
            return None
        rank_zero_info(f"going on from step {found.step}, from {found.source}")
        if trainer.global_rank > 0 and found.source != Memory.name:
            log.warning("rank %d goes on from step %d, from %s", trainer.global_rank, found.step, found.source)
        self._rank_state = found.state.pop("rank_state", None)
        self._gradient_order = found.state["gradient_order"]
        self._loop.resume(found.state)
        return found.state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step back where the user has named a checkpoint; find pieces of the model, which a rank has only now."""
        if not is_sharded(trainer):
            if trainer.ckpt_path is not None:
                self._give_way(trainer)
        elif not getattr(trainer, "fast_dev_run", False):
            place_meta = {"world_size": trainer.world_size, "layout": layout(trainer)}
            if (state := self._open(trainer, pl_module, place_meta)) is not None:
                restore_pieces(trainer, state, lambda: self._give_way(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data that cannot be put back, before the first batch."""
        if self._loop is not None:
            refuse_loaders(trainer, self.replay)
            self._last_step = self._captured_step = trainer.global_step
            if self._rank_state is not None:
                trainer.strategy.load_rank_state_dict(self._rank_state)  # type: ignore[attr-defined]
                self._rank_state = None
            if self._gradient_order:
                replay(trainer.strategy.model, pl_module, self._gradient_order)
            elif not is_sharded(trainer):  # nothing lays gradients out anew there
                self._order = GradientOrder(pl_module)
            self._stop = StopSignal(self._store)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Wait until what the optimizer changes has been copied."""
        if self.lazy and self._tiers is not None:
            start_s = time.perf_counter()
            self._tiers.wait_copied()
            if "blocked_ms" in self._numbers:
                self._numbers["blocked_ms"] += 1e3 * (time.perf_counter() - start_s)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log what the captures since the last batch took, and the replay before the first."""
        if self._loop is not None and self._loop.replay_s is not None:
            self._numbers["replay_s"], self._loop.replay_s = self._loop.replay_s, None
        for name, value in self._numbers.items():
            pl_module.log(f"memory_checkpoint/{name}", value)
        self._numbers = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the memory back: this fit needs no going on any more."""
        if self._tiers is not None:
            trainer.strategy.barrier("MemoryCheckpoint.on_fit_end")
            self._tiers.settle()
            trainer.strategy.barrier("MemoryCheckpoint.on_fit_end, settled")
            self._tiers.end()
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave; the memory stays for the next start."""
        self._leave()

    def _give_way(self, trainer: Trainer) -> None:
        """Do not go on from what was found: Lightning goes on from a checkpoint that the user has named."""
        if self._loop is not None and self._loop.give_up():
            self._rank_state = None
            self._gradient_order = []
            rank_zero_warn(f"left aside what memory held of this job: fit was given ckpt_path={str(trainer.ckpt_path)!r}")

    def _folder(self, trainer: Trainer, job: str, fit: int) -> Path | None:
        """Return the folder of this fit's steps on disk, the same on all ranks."""
        if self.disk_dir is False:
            return None
        root = Path(self.disk_dir or Path(trainer.default_root_dir) / "memory_checkpoint" / job)
        return Path(trainer.strategy.broadcast(str(root.absolute() / f"fit-{fit}")))

    def _between_iterations(self, trainer: Trainer) -> None:
        """Capture or stop, if the last iteration took an optimizer step, so that no gradients wait."""
        step, before, self._last_step = trainer.global_step, self._last_step, trainer.global_step
        if self._tiers is None or step == before:
            return
        stop = self._stop is not None and self._stop.due(step)
        if stop or step // self.every_n_steps != self._captured_step // self.every_n_steps:
            self._captured_step = step
            self._capture(trainer, self._tiers, step)
        if stop:
            self._tiers.settle(PATIENT_S)
            if self._stop is not None:
                self._stop.leave(trainer.global_rank, trainer.world_size, PATIENT_S)
            rank_zero_warn(f"SIGTERM: stopped after step {step}, whose state is in memory; exit code {EXIT_CODE}")
            raise SystemExit(EXIT_CODE)

    def _capture(self, trainer: Trainer, tiers: Tiers, step: int) -> None:
        assert self._loop is not None
        start_s = time.perf_counter()
        tiers.settle()
        if not tiers.active:
            return
        sharded = is_sharded(trainer)
        state = take_pieces(self._loop) if sharded else self._loop.take()
        if hasattr(trainer.strategy, "rank_state_dict"):
            state["rank_state"] = trainer.strategy.rank_state_dict()
        state["gradient_order"] = self._gradient_order or (self._order.names if self._order is not None else [])
        if not self._checked:
            check_loads(state)
            self._checked = True
        parameters = None if sharded else {name for name, _ in trainer.lightning_module.named_parameters()}
        ages = {f"{tier}_age_s": age_s for tier, age_s in tiers.ages().items()}
        captured = tiers.capture(step, state, parameters, self.lazy and not sharded)
        self._numbers = {
            "blocked_ms": 1e3 * (time.perf_counter() - start_s),
            "captured_mb": 1e-6 * captured,
            "committed_step": float(tiers.committed),
            **ages,
        }

    def _leave(self) -> None:
        for part in (self._loop, self._stop, self._order):
            if part is not None:
                part.close()
        if self._tiers is not None and self._tiers.active:
            self._tiers.leave()
        self._loop = self._stop = self._order = self._tiers = self._store = None
        self._gradient_order = []


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse what this callback is not made for, by name.

    Raises:
        InputError: for a strategy that keeps the model, or what it saves, in a way of its own.
    """
    strategies = submodule("strategies")
    strategy = trainer.strategy
    made_for = "MemoryCheckpoint is made for one device, DDP and ModelParallelStrategy (FSDP2)"
    if type(strategy).__name__ in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise InputError(
            f"{made_for}, got {type(strategy).__name__}, which keeps the ranks' parts of the model in a way of its own; use "
            "ModelParallelStrategy with fully_shard, or ModelCheckpoint"
        )
    if not is_sharded(trainer) and not isinstance(strategy, strategies.SingleDeviceStrategy | strategies.DDPStrategy):
        raise InputError(f"{made_for}, got {type(strategy).__name__}; use ModelCheckpoint")


def _store(trainer: Trainer) -> Store | None:
    """Return a store of this start, of which rank 0 tells the others where it is."""
    if trainer.world_size == 1:
        return None
    if trainer.global_rank == 0:
        address = interface_address(_rank_0_address())
        store = make_store(0, trainer.world_size, address)
        trainer.strategy.broadcast([address, store.port])
        return store
    told: Any = trainer.strategy.broadcast(None)
    return make_store(trainer.global_rank, trainer.world_size, *told)


def _rank_0_address() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
