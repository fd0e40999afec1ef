"""What each process of the recipe ``survive`` does: train, and say so in its journal.

It is started by torchrun's agent, and started again after a kill. The folder that it is given is the launch's; the name of the
folder above is the training's, ``undisturbed`` or ``killed``. Only the latter has a `MemoryCheckpoint`, so that what it is
compared with owes nothing to it.
"""

import hashlib
import os
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.recipes._seams import RESTARTS_VARIABLE
from lightning_plugins.recipes.quiet import quiet
from lightning_plugins.recipes.refusals import fit_refusals
from lightning_plugins.recipes.survive_journal import Journal, process_file
from lightning_plugins.recipes.survive_learner import Learner
from lightning_plugins.recipes.survive_options import CLI

UNDISTURBED, KILLED = "undisturbed", "killed"
OFF = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Witness(Callback):
    """Writes down the start, every step, and checksums of what there is in the end.

    Args:
        journal: of this process.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.journal.write(kind="start", pid=os.getpid(), step=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.journal.write(kind="step", step=trainer.global_step, loss=outputs["loss"].item(), samples=batch[2].tolist())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.journal.write(kind="end", checksums=checksums(trainer, pl_module))


def main(options: list[str], folder: RunFolder, resume: bool) -> None:
    """Train as one of several processes, from the start or from what memory holds."""
    training = folder.path.parent
    with quiet():
        cli = CLI(folder, options)
    knobs, rank = cli.config, int(os.environ["RANK"])
    journal = Journal(process_file(folder.path, rank), restart=int(os.environ.get(RESTARTS_VARIABLE, "0")))
    callbacks: list[Callback] = [Witness(journal)]
    if training.name == KILLED:
        # The job bears the name of the training, not of the launch: a run that goes on with --resume finds its memory, too.
        callbacks.insert(0, MemoryCheckpoint(job=f"survive {training}", every_n_steps=knobs.capture_every, disk_dir=False))
    with quiet():
        settings: dict[str, Any] = {**OFF, "max_epochs": knobs.epochs, "strategy": "ddp" if knobs.processes > 1 else "auto"}
        trainer = cli.another_trainer(callbacks, "survive", **settings)
        learner = Learner(knobs.processes, knobs.epochs)
        _draw_numbers_of_its_own(knobs.seed_everything + rank)
        with fit_refusals(trainer):
            trainer.fit(learner)
    journal.close()


def checksums(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """Return SHA-256 of all bits of this process's weights and buffers, optimizer, learning-rate schedule and generators."""
    optimizer = trainer.optimizers[0].state_dict()
    moments = [value for state in optimizer["state"].values() for value in state.values()]
    schedules = [str(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
    generators = [repr(random.getstate()), repr(np.random.get_state(legacy=False)), torch.get_rng_state()]  # noqa: NPY002
    return {
        "weights": _checksum(module.state_dict().values()),
        "optimizer": _checksum([*moments, str(optimizer["param_groups"])]),
        "learning-rate schedule": _checksum(schedules),
        "random generators": _checksum(generators),
    }


def _draw_numbers_of_its_own(seed: int) -> None:
    """Have this process draw other noise and drop out other units than its neighbours; DDP hands round the first one's weights.

    Lightning's own ``seed_everything`` would also change the seed by which all processes shuffle alike, and they would share
    samples.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a data set of a user's may draw from it
    torch.manual_seed(seed)


def _checksum(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        raw = value.detach().cpu().contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        digest.update(f"{len(raw)}:".encode() + raw)
    return digest.hexdigest()
