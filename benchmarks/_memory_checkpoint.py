"""One contestant of ``memory_checkpoint_blocked.py``: a real Trainer in a process of its own that steps when its turn comes.

A turn is ``CADENCE`` steps: an unmeasured one, an ordinary one, one after which the contestant saves, and the ten that follow.
The training's thread is held up between two steps (after the optimizer, before the next batch) or between backward pass and
optimizer; both gaps are timed from inside the module, alike for all, whatever the callbacks do there.
"""

import ctypes
import shutil
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_plugins._lightning import Callback, LightningModule, Trainer, submodule
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.callbacks.memory_checkpoint._seams import OpenedLoop
from lightning_plugins.engines.resilience import tiers
from lightning_plugins.engines.resilience.keeper_client import KeeperClient, Writing

BEFORE, FOLLOWING = 3, 10
CADENCE = BEFORE + FOLLOWING
TABLES, WIDTH, ROWS = 48, 256, 256
SETTLED_AT_MOST_S = 120.0
FLOOR, STOCK, ASYNC_IO = "memcpy", "ModelCheckpoint", "ModelCheckpoint, AsyncCheckpointIO"
DCP, DCP_STAGED = "DCP async_save", "DCP async_save, staged in a thread"
EAGER, LAZY = "MemoryCheckpoint", "MemoryCheckpoint, lazy"
CONTESTANTS = (FLOOR, STOCK, ASYNC_IO, DCP, DCP_STAGED, EAGER, LAZY)
# Parts of one of our saves, by what does them; timed where they run in the training's thread.
PARTS: dict[str, tuple[Any, str]] = {
    "settle": (tiers.Tiers, "settle"),
    "state": (OpenedLoop, "take"),
    "split": (tiers, "split"),
    "pack": (tiers, "pack"),
    "begin": (KeeperClient, "begin"),
    "copy": (Writing, "copy"),
    "seal": (Writing, "seal"),
    "follow": (tiers.JobCommit, "follow"),
}


class Turn(NamedTuple):
    """What one turn took, in seconds."""

    ordinary: float  # a step without anything
    forward_backward: float  # of it
    ordinary_gap: float  # of it, between optimizer and next step
    ordinary_join: float  # of it, between backward pass and optimizer
    gap: float  # as above, around the save
    join: float
    following: float  # the ten steps after it, join included
    parts: dict[str, float]


class Ended(NamedTuple):
    """What a contestant says at its end; MB are 10^6 bytes."""

    peak_mb: float
    before_mb: float  # of the same process, before it trained
    shared_mb: float  # of the peak, memory that it shares with the keeper
    keeper_mb: float  # slots
    tensors: int
    setting: str


@dataclass
class Marks:
    """Moments of one step."""

    started: float
    backward: float = 0.0
    before_optimizer: float = 0.0
    after_optimizer: float = 0.0
    next_entered: float = 0.0


class Tables(LightningModule):
    """Tables with SparseAdam, which changes few rows, so that the step is cheap; a frozen layer makes it as long as wanted.

    Args:
        state_mb: parameters and both moments together, in 10^6 bytes.
    """

    def __init__(self, state_mb: float) -> None:
        super().__init__()
        height = max(ROWS, round(1e6 * state_mb / (3 * 4 * TABLES * WIDTH)))
        self.tables = nn.ParameterList([torch.randn(height, WIDTH) for _ in range(TABLES)])
        self.frozen = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5, requires_grad=False)
        self.optimizer = torch.optim.SparseAdam(list(self.tables))
        # Now, and not zeros: pages that nobody has written to would be copied for next to nothing.
        for table in self.tables:
            moments = {name: torch.rand(height, WIDTH) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[table] = {"step": 0, **moments}
        self.repeats = 0
        self.marks: list[Marks] = []
        self.pause: Callable[[list[Marks]], int | None] = lambda _: None

    def state_tensors(self) -> list[Tensor]:
        """Return what a save has to take, in bulk."""
        moments = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return [*(value.detach() for value in self.state_dict().values()), *moments]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        entered = time.perf_counter()
        if self.marks:
            self.marks[-1].next_entered = entered
        if self.global_step % CADENCE == FOLLOWING:
            repeats = self.pause(self.marks)
            self.marks = []
            self.trainer.should_stop = repeats is None
            self.repeats = repeats or 0
        self.marks.append(Marks(time.perf_counter()))
        rows = (batch * 7919 + torch.arange(ROWS)) % len(self.tables[0])
        hidden = torch.stack([functional.embedding(rows[:8], table, sparse=True) for table in self.tables]).flatten(0, 1)
        with torch.no_grad():  # activations would be memory that has nothing to do with saving
            busy = hidden
            for _ in range(self.repeats):
                busy = torch.tanh(busy @ self.frozen)
        return hidden.square().mean()

    def on_after_backward(self) -> None:
        self.marks[-1].backward = time.perf_counter()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # after those of all callbacks
        self.marks[-1].before_optimizer = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.marks[-1].after_optimizer = time.perf_counter()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def _at_cadence(trainer: Trainer) -> bool:
    return trainer.global_step % CADENCE == 0


class Memcpy(Callback):
    """The floor: the state's tensors into memory of the same process that is there already."""

    def __init__(self, module: Tables) -> None:
        self.targets = [torch.full_like(tensor, 1) for tensor in module.state_tensors()]
        tried = {}
        for name, way in (("Tensor.copy_", self._torch), ("numpy.copyto", self._numpy), ("memmove", self._memmove)):
            taken = []
            for _ in range(5):
                start_s = time.perf_counter()
                way(module.state_tensors())
                taken.append(time.perf_counter() - start_s)
            tried[min(taken)] = (name, way)
        self.setting, self._way = tried[min(tried)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if _at_cadence(trainer):
            assert isinstance(pl_module, Tables)
            self._way(pl_module.state_tensors())

    def _torch(self, tensors: list[Tensor]) -> None:
        for target, tensor in zip(self.targets, tensors, strict=True):
            target.copy_(tensor)

    def _numpy(self, tensors: list[Tensor]) -> None:
        for target, tensor in zip(self.targets, tensors, strict=True):
            np.copyto(target.numpy(), tensor.numpy())

    def _memmove(self, tensors: list[Tensor]) -> None:
        for target, tensor in zip(self.targets, tensors, strict=True):
            ctypes.memmove(target.data_ptr(), tensor.data_ptr(), tensor.nbytes)


class DcpAsync(Callback):
    """torch.distributed.checkpoint.async_save in its thread mode, as a user would call it."""

    def __init__(self, folder: Path, staged_in_thread: bool) -> None:
        self.folder, self.staged_in_thread = folder, staged_in_thread
        self.staged: Future[Any] | None = None
        self.written: Future[Any] | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not _at_cadence(trainer):
            return
        state = {"state_dict": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()}
        # A new one each time: torch 2.11 raises KeyError where one is used twice. BlockingAsyncStager's cache needs CUDA.
        stager = DefaultStager(StagingOptions(False, False, self.staged_in_thread, False))
        saving: Any = dcp.async_save(state, checkpoint_id=self.folder / str(trainer.global_step), async_stager=stager)
        self.staged = getattr(saving, "staging_completion", None)
        self.written = getattr(saving, "upload_completion", saving)

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self.staged is not None:
            self.staged.result()
            self.staged = None

    def settle(self) -> None:
        """Wait for the file; remove those before, which costs the training nothing here."""
        if self.written is not None:
            self.written.result()
        for old in sorted(self.folder.glob("*"), key=lambda path: int(path.name))[:-1]:
            shutil.rmtree(old)


class CountingIO(submodule("plugins.io").TorchCheckpointIO):  # type: ignore[misc]
    """Lightning's own, and how many files it has written."""

    written = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        self.written += 1


@dataclass
class Contestant:
    """How one saves.

    Attributes:
        settle: waits until nothing of the last save runs any more.
        keeper_bytes: of memory that it holds outside of the trainer.
    """

    callbacks: list[Callback] = field(default_factory=list)
    plugins: list[Any] = field(default_factory=list)
    setting: str = ""
    settle: Callable[[], None] = lambda: None
    keeper_bytes: Callable[[], int] = lambda: 0


def make(name: str, module: Tables, folder: Path) -> Contestant:
    """Return a contestant that writes below ``folder``, if it writes."""
    if name == FLOOR:
        floor = Memcpy(module)
        return Contestant([floor], setting=f"copied by {floor.setting}")
    if name in (STOCK, ASYNC_IO):
        saver = submodule("callbacks").ModelCheckpoint(dirpath=folder, every_n_train_steps=CADENCE)
        counting = CountingIO()
        plugins = [submodule("plugins.io").AsyncCheckpointIO(counting)] if name == ASYNC_IO else [counting]

        def settle() -> None:
            wait_for(lambda: counting.written >= module.global_step // CADENCE)

        return Contestant([saver], plugins, f"save_top_k=1, every_n_train_steps={CADENCE}", settle)
    if name in (DCP, DCP_STAGED):
        dcp_async = DcpAsync(folder, name == DCP_STAGED)
        return Contestant(
            [dcp_async], setting=f"StagingOptions(False, False, {name == DCP_STAGED}, False)", settle=dcp_async.settle
        )
    job = f"blocked-{folder.name}"
    callback = MemoryCheckpoint(job=job, every_n_steps=CADENCE, lazy=name == LAZY, disk_dir=False, resume=False, linger_s=20.0)
    client: list[KeeperClient] = []

    def watch() -> KeeperClient:
        if not client:
            client.append(KeeperClient(f"{job}/0"))
        return client[0]

    def committed() -> None:
        saves = module.global_step // CADENCE
        newest = saves * CADENCE
        wait_for(lambda: not saves or all(each.state == "committed" for each in watch().generations() if each.step == newest))

    def keeper_bytes() -> int:
        return sum(int(held) for job_name, held in watch().status()["jobs"].items() if job_name == f"{job}/0")

    return Contestant([callback], setting=f"every_n_steps={CADENCE}, disk_dir=False", settle=committed, keeper_bytes=keeper_bytes)


def wait_for(is_so: Callable[[], bool]) -> None:
    """Return when it is so.

    Raises:
        TimeoutError: if it is not for long.
    """
    deadline = time.monotonic() + SETTLED_AT_MOST_S
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a save was not complete {SETTLED_AT_MOST_S:g} s after the steps that followed it")
        time.sleep(0.005)


def compete(name: str, module: Tables, folder: Path, parent: Connection, inherited: list[Connection]) -> None:
    """Train in turns: send ``None`` or a ``Turn``, receive how long the next steps are, None to end; send ``Ended`` at last."""
    for end in inherited:  # the parent's: else nobody would see it die
        end.close()
    torch.set_num_threads(1)
    before_mb = memory_mb("VmRSS")
    contestant = make(name, module, folder)
    parts: dict[str, list[float]] = defaultdict(list)
    if name in (EAGER, LAZY):
        time_parts(parts)
    ended: list[Ended] = []

    def pause(marks: list[Marks]) -> int | None:
        contestant.settle()
        sums = {part: sum(taken) for part, taken in parts.items()}
        parent.send(turn_of(marks, sums) if len(marks) == CADENCE else None)
        parts.clear()
        repeats: int | None = parent.recv()
        if repeats is None:
            slots_mb = 1e-6 * contestant.keeper_bytes()
            shared_mb = memory_mb("RssShmem")
            tensors = len(module.state_tensors())
            ended.append(Ended(memory_mb("VmHWM"), before_mb, shared_mb, slots_mb, tensors, contestant.setting))
        return repeats

    module.pause = pause
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        enable_checkpointing=name in (STOCK, ASYNC_IO),
        callbacks=contestant.callbacks,
        plugins=contestant.plugins,
        **options,
    )
    trainer.fit(module, DataLoader(range(1_000_000), batch_size=1))
    parent.send(ended[0])


def turn_of(marks: list[Marks], parts: dict[str, float]) -> Turn:
    """Return the times of a turn's steps."""
    ordinary, saved, following = marks[BEFORE - 2], marks[BEFORE - 1], marks[BEFORE:]
    return Turn(
        ordinary=ordinary.next_entered - ordinary.started,
        forward_backward=ordinary.backward - ordinary.started,
        ordinary_gap=ordinary.next_entered - ordinary.after_optimizer,
        ordinary_join=ordinary.before_optimizer - ordinary.backward,
        gap=saved.next_entered - saved.after_optimizer,
        join=following[0].before_optimizer - following[0].backward,
        following=following[-1].next_entered - following[0].started,
        parts=parts,
    )


def time_parts(taken: dict[str, list[float]]) -> None:
    """Have the parts of our saves timed in this process from now on, in its training thread."""
    main = threading.main_thread()

    def timed(name: str, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return part(*args, **kwargs)
        finally:
            if threading.current_thread() is main:
                taken[name].append(time.perf_counter() - start_s)

    for name, (owner, attribute) in PARTS.items():
        original = getattr(owner, attribute)
        wrapped = partial(timed, name, original)
        # A partial is no method: a function is, and gets its object.
        setattr(owner, attribute, (lambda *a, _w=wrapped, **k: _w(*a, **k)) if isinstance(owner, type) else wrapped)


def memory_mb(field_name: str) -> float:
    """Return a field of this process's status, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1.024e-3 * int(line.split()[1]) for line in lines if line.startswith(f"{field_name}:"))


def median_parts(turns: list[Turn]) -> Iterator[tuple[str, float]]:
    """Yield the parts of a save and their medians in seconds."""
    for part in PARTS:
        if any(part in turn.parts for turn in turns):
            yield part, statistics.median(turn.parts.get(part, 0.0) for turn in turns)
