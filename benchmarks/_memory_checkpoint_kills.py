"""The processes of ``memory_checkpoint_kills.py``: a training that is killed, and a new start that says what it finds.

Every tensor tells the step that it belongs to. All gradients are -1 and SGD has learning rate and momentum 1, so that after
step s every number of every parameter is s (s + 1) / 2, and of every momentum buffer -s, exactly. So what a new start has loaded
is judged by its numbers alone, whoever wrote and read them.
"""

import json
import math
import mmap
import os
import struct
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import DataLoader

from lightning_plugins._lightning import Callback, LightningModule, Trainer, submodule
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.engines.resilience.disk_steps import steps as steps_on_disk
from lightning_plugins.strategies.verified_checkpoint import VerifiedCheckpointIO

TENSORS = 12
CADENCE = 10  # steps between two saves
# Added to each, as if an accelerator computed: the slowest save in a thread has to fit between two, or they would pile up.
STEP_S = 0.025
NUMBER = struct.Struct("<q")
OFF = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Counted(LightningModule):
    """Parameters and momentum that tell the step.

    Args:
        state_mb: both together, in 10^6 bytes.
    """

    def __init__(self, state_mb: float) -> None:
        super().__init__()
        numbers = max(1, round(1e6 * state_mb / (2 * 4 * TENSORS)))
        self.tensors = nn.ParameterList([torch.zeros(numbers) for _ in range(TENSORS)])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(STEP_S)
        return -torch.stack([tensor.sum() for tensor in self.tensors]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=1.0)


def steps_inside(module: Counted, optimizer: torch.optim.Optimizer) -> set[int | None]:
    """Return the steps that the tensors tell; None stands for a number, or a tensor that is missing, that tells none."""
    told: set[int | None] = set()
    for tensor in module.tensors:
        told |= {_root(value.item()) for value in torch.aminmax(tensor.detach())}
        momentum = optimizer.state[tensor].get("momentum_buffer")
        told |= {None} if momentum is None else {_whole(-value.item()) for value in torch.aminmax(momentum)}
    return told


def _whole(value: float) -> int | None:
    return int(value) if value >= 0 and value.is_integer() else None


def _root(value: float) -> int | None:
    """Return the s with s (s + 1) / 2 = value."""
    whole = _whole(value)
    step = (math.isqrt(8 * whole + 1) - 1) // 2 if whole is not None else 0
    return step if step * (step + 1) / 2 == value else None


class Progress(Callback):
    """Writes the steps that are done into a mapped file, which a SIGKILL leaves as it is, before anyone saves."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.number = mmap.mmap(file.fileno(), NUMBER.size)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        NUMBER.pack_into(self.number, 0, trainer.global_step)


class AppState:
    """Model, optimizer and step as ``torch.distributed.checkpoint``'s own recipe wraps them."""

    def __init__(self, trainer: Trainer) -> None:
        self.module, self.optimizer, self.step = trainer.lightning_module, trainer.optimizers[0], trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


class DcpAsync(Callback):
    """``async_save`` as torch's recipe has it: the last one is waited for before the next.

    Args:
        folder: of all saves.
        reused: whether they all go to one place in it.
        load: what a new start loads.
    """

    def __init__(self, folder: Path, reused: bool, load: Path | None) -> None:
        self.folder, self.reused, self.load = folder, reused, load
        self.saving: Future[Any] | None = None
        self.loaded_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.load is not None:
            app = AppState(trainer)
            dcp.load({"app": app}, checkpoint_id=self.load)
            self.loaded_step = app.step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step % CADENCE == 0:
            if self.saving is not None:
                self.saving.result()
            place = self.folder / ("latest" if self.reused else str(trainer.global_step))
            self.saving = dcp.async_save({"app": AppState(trainer)}, checkpoint_id=place)


@dataclass(frozen=True)
class Method:
    """A way to save, with settings as its documentation has them.

    Attributes:
        parts: return callbacks and plugins, of a run that saves below the folder and, if it is a new start, loads that path.
        candidates: return what a user would try to load, newest first; None leaves the choice to the method.
        copies: files that a save writes, as long as the state each.
        temporary_elsewhere: whether the system's temporary folder is on another file system than the checkpoints.
        memory_lost: whether the kill takes all that the method has running, not the training alone.
        settings: for the table.
    """

    parts: Callable[[Path, Path | None], tuple[list[Callback], list[Any]]]
    candidates: Callable[[Path], list[Path] | None]
    settings: str
    copies: int = 1
    temporary_elsewhere: bool = False
    memory_lost: bool = False


def _lightning(save_last: bool, io: Callable[[], list[Any]] = list) -> Callable[..., tuple[list[Callback], list[Any]]]:
    def parts(folder: Path, load: Path | None) -> tuple[list[Callback], list[Any]]:
        options = {"save_last": True} if save_last else {}
        return [submodule("callbacks").ModelCheckpoint(dirpath=folder, every_n_train_steps=CADENCE, **options)], io()

    return parts


def _files(folder: Path) -> list[Path]:
    """Return the ``last`` that ``ckpt_path="last"`` stands for, then the others by the step in their name."""
    return sorted(folder.glob("*.ckpt"), key=lambda path: (path.stem == "last", _number(path)), reverse=True)


def _number(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem.rpartition("=")[2])) or 0)


def _dcp(reused: bool) -> Callable[..., tuple[list[Callback], list[Any]]]:
    return lambda folder, load: ([DcpAsync(folder, reused, load)], [])


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=_number, reverse=True)


def _ours(disk: bool) -> Callable[..., tuple[list[Callback], list[Any]]]:
    def parts(folder: Path, load: Path | None) -> tuple[list[Callback], list[Any]]:
        options: dict[str, Any] = {"disk_dir": folder, "disk_every_n_steps": CADENCE} if disk else {"disk_dir": False}
        return [MemoryCheckpoint(job=f"kills {folder}", every_n_steps=CADENCE, linger_s=20.0, **options)], []

    return parts


def _async_io() -> list[Any]:
    return [submodule("plugins.io").AsyncCheckpointIO()]


EVERY = f"every_n_train_steps={CADENCE}"
METHODS = {
    "ModelCheckpoint": Method(_lightning(True), _files, f"{EVERY}, save_last=True", copies=2),
    "ModelCheckpoint, /tmp elsewhere": Method(_lightning(True), _files, f"{EVERY}, save_last=True", 4, True),
    "AsyncCheckpointIO": Method(_lightning(False, _async_io), _files, EVERY),
    "AsyncCheckpointIO, /tmp elsewhere": Method(_lightning(False, _async_io), _files, EVERY, 2, True),
    "AsyncCheckpointIO, save_last": Method(_lightning(True, _async_io), _files, f"{EVERY}, save_last=True", 2),
    "DCP async_save, a folder a step": Method(_dcp(False), _folders, f"every {CADENCE} steps, waits for the one before"),
    "DCP async_save, one folder": Method(_dcp(True), _folders, f"every {CADENCE} steps, waits for the one before"),
    "VerifiedCheckpointIO": Method(_lightning(True, lambda: [VerifiedCheckpointIO()]), _files, f"{EVERY}, save_last=True", 2),
    "MemoryCheckpoint": Method(_ours(False), lambda _: None, f"every_n_steps={CADENCE}, disk_dir=False"),
    "MemoryCheckpoint, memory lost too": Method(
        _ours(True), lambda _: None, f"every_n_steps={CADENCE}, disk_every_n_steps={CADENCE}", memory_lost=True
    ),
}


def is_saved(folder: Path) -> bool:
    """Tell whether a first save of any method is complete, as far as names tell."""
    names = ("*.ckpt", "*/.metadata", "fit-*/step-*/manifest.json")
    return any(True for name in names for _ in folder.glob(name))


def train(name: str, state_mb: float, folder: Path, progress: Path, temporary: Path, log: Path) -> NoReturn:
    """Train until killed."""
    _begin(temporary, log)
    try:
        callbacks, plugins = METHODS[name].parts(folder, None)
        _fit(state_mb, folder, [Progress(progress), *callbacks], plugins)
    finally:
        traceback.print_exc()
        os._exit(1)


class Judge(Callback):
    """Judges what a new start has before its first batch, and ends it there."""

    def __init__(self, answer: Path, callbacks: list[Callback]) -> None:
        self.answer, self.callbacks = answer, callbacks

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Counted)
        told = [each.loaded_step for each in self.callbacks if isinstance(each, DcpAsync)] or [trainer.global_step]
        if told != [0]:  # else it began afresh
            told += steps_inside(pl_module, trainer.optimizers[0])
            self.answer.write_text(json.dumps({"step": told[0], "mixed": len(set(told)) > 1}))
        os._exit(0)


def start_anew(name: str, state_mb: float, folder: Path, load: Path | None, answer: Path, temporary: Path, log: Path) -> NoReturn:
    """Start as a user would after the kill; ``answer`` says what was loaded, and is not written if nothing was."""
    _begin(temporary, log)
    try:
        callbacks, plugins = METHODS[name].parts(folder, load)
        path = str(load) if load is not None and load.suffix == ".ckpt" else None
        _fit(state_mb, folder, [*callbacks, Judge(answer, callbacks)], plugins, path)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def whole_on_disk(folder: Path) -> tuple[bool, int]:
    """Return whether the newest step of our disk tier is damaged, and the bytes of those that are not."""
    found = [step for each in folder.glob("fit-*") for step in steps_on_disk(each)]
    kept = [path for step in found if not step.damage for path in step.path.iterdir()]
    return bool(found and found[0].damage), sum(path.stat().st_size for path in kept)


def _begin(temporary: Path, log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    warnings.filterwarnings("ignore")


def _fit(state_mb: float, folder: Path, callbacks: list[Callback], plugins: list[Any], ckpt_path: str | None = None) -> None:
    saves = any(isinstance(each, submodule("callbacks").ModelCheckpoint) for each in callbacks)
    settings = {**OFF, "enable_checkpointing": saves, "default_root_dir": folder}
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, plugins=plugins, **settings)
    trainer.fit(Counted(state_mb), DataLoader(range(1_000_000), batch_size=1), ckpt_path=ckpt_path)
