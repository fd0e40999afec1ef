"""One trial of a comparison under a Lightning Trainer: the task as a module, and the callback that measures it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_plugins import Preconditioner
from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.recipes.comparison_tasks import TASKS, Batch, Task
from lightning_plugins.recipes.comparison_trials import FIRST_ORDER, Trial
from lightning_plugins.recipes.quiet import quiet
from lightning_plugins.recipes.refusals import fit_refusals

# A trial ends when its loss is so many times that before the first step.
DIVERGED = 10.0


class Contestant(LightningModule):
    """A task's network with the optimizer of a trial.

    Args:
        task: name in ``TASKS``.
        seed: of weights and batches.
        trial: gives the optimizer.

    Raises:
        InputError: for an unknown task.
    """

    def __init__(self, task: str, seed: int, trial: Trial) -> None:
        super().__init__()
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}; {nearest(task, TASKS)}")
        self.task: Task = TASKS[task](seed)
        self.trial = trial
        self.network = self.task.make_module()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.task.loss(self.network(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        return self.trial.make_optimizer(self.network)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(_Batches(self.task), batch_size=None)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss on the evaluation set."""
        inputs, targets = (tensor.to(self.device) for tensor in self.task.evaluation)
        return float(self.task.loss(self.network(inputs), targets))


class _Batches(IterableDataset[Batch]):
    """The batches of a task, without end."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __iter__(self) -> Iterator[Batch]:
        return self.task.batches()


@dataclass
class Record:
    """What a trial did.

    Attributes:
        trial: its setting.
        points: step, seconds of training until then, and loss on the evaluation set.
        diverged: whether it was ended for that.
    """

    trial: Trial
    points: list[tuple[int, float, float]] = field(default_factory=list)
    diverged: bool = False

    @property
    def final(self) -> float:
        """Return the last loss; infinity of a trial that diverged."""
        return math.inf if self.diverged else self.points[-1][2]

    def first_at(self, loss: float) -> tuple[int, float] | None:
        """Return step and seconds of the first evaluation with this loss or less."""
        return next(((step, seconds) for step, seconds, at in self.points if at <= loss), None)


class Measure(Callback):
    """Evaluates every few steps, and counts the seconds of the steps alone: neither evaluation nor making of batches.

    Args:
        every: steps between two evaluations.
        advance: called after each step.
    """

    def __init__(self, record: Record, every: int, advance: Callable[[], object]) -> None:
        self.record = record
        self.every = every
        self.advance = advance
        self._spent_s = 0.0
        self._start_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start_s = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, Contestant)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._spent_s += time.perf_counter() - self._start_s
        self.advance()
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Contestant)
        points = self.record.points
        points.append((trainer.global_step, self._spent_s, module.evaluate()))
        self.record.diverged = not points[-1][2] <= DIVERGED * points[0][2]
        trainer.should_stop = self.record.diverged


def run_trial(
    make_trainer: Callable[[list[Any]], Trainer], contestant: Contestant, every: int, advance: Callable[[], object]
) -> Record:
    """Train a contestant to its end.

    Args:
        make_trainer: returns a Trainer with these callbacks.
        contestant: what is trained.
        every: steps between two evaluations.
        advance: called after each step.
    """
    trial = contestant.trial
    preconditioner = None if trial.method in FIRST_ORDER else Preconditioner(trial.method, **trial.options())
    record = Record(trial)
    measure = Measure(record, every, advance)
    with quiet(), _one_thread():
        trainer = make_trainer([measure] if preconditioner is None else [preconditioner, measure])
        with fit_refusals(trainer):
            trainer.fit(contestant)
    return record


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch on one core: its matrices are small here, and seconds on shared cores would be those of waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
