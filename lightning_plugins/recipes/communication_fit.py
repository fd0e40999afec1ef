"""A task trained with one contestant on several processes, measured: loss, accuracy, seconds and bytes."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_plugins._lightning import Callback, DDPStrategy, LightningModule, Trainer
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.recipes.communication_contestants import sent_bytes
from lightning_plugins.recipes.communication_tasks import LEARNING_RATES, TASKS, share
from lightning_plugins.recipes.comparison_tasks import Batch
from lightning_plugins.recipes.quiet import quiet
from lightning_plugins.recipes.refusals import fit_refusals


class Point(NamedTuple):
    """What was measured after a step.

    Attributes:
        step: optimizer steps until then.
        seconds: of training steps on the first process, waiting for the others included.
        sent_mb: in gradients, by the process that sent most.
        loss: on the evaluation set.
        accuracy: on it, share of the answers that are right.
    """

    step: int
    seconds: float
    sent_mb: float
    loss: float
    accuracy: float


class Learner(LightningModule):
    """A task's network and SGD with momentum, whose learning rate falls to 0 in a line; every process has its share of a batch.

    Args:
        task: name in ``TASKS``.
        seed: of weights and batches.

    Raises:
        InputError: for an unknown task.
    """

    def __init__(self, task: str, seed: int) -> None:
        super().__init__()
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}; {nearest(task, TASKS)}")
        self.task = TASKS[task](seed)
        self.learning_rate = LEARNING_RATES[task]
        self.network = self.task.make_module()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.task.loss(self.network(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.network.parameters(), lr=self.learning_rate, momentum=0.9)
        falling = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(_Shares(self, self.trainer.global_rank, self.trainer.world_size), batch_size=None)

    @torch.no_grad()
    def evaluate(self, sent: int) -> tuple[float, float, int]:
        """Evaluate on all processes together, each its share of the evaluation set.

        Args:
            sent: bytes that this process has sent.

        Returns:
            Loss and accuracy, and the most bytes that any process has sent.
        """
        inputs, targets = share(self.task.evaluation, self.trainer.global_rank, self.trainer.world_size)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        answers = self.network(inputs)
        right = (answers.argmax(dim=-1) == targets).double().mean()
        mine = torch.stack([self.task.loss(answers, targets).double(), right, right.new_tensor(sent)])
        of_all = self.all_gather(mine)
        assert isinstance(of_all, Tensor)
        loss, accuracy, _ = of_all.mean(dim=0).tolist()
        return loss, accuracy, int(of_all[:, 2].max())


class _Shares(IterableDataset[Batch]):
    """A process's share of the batches of a task, without end."""

    def __init__(self, learner: Learner, rank: int, ranks: int) -> None:
        self.task, self.rank, self.ranks = learner.task, rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        return (share(batch, self.rank, self.ranks) for batch in self.task.batches())


class Measure(Callback):
    """Evaluates every few steps, and counts the seconds of the steps alone: neither evaluation nor making of batches.

    Args:
        every: steps between two evaluations.
        advance: called after each step.
    """

    def __init__(self, every: int, advance: Callable[[], object]) -> None:
        self.points: list[Point] = []
        self.every = every
        self.advance = advance
        self._spent_s = 0.0
        self._start_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start_s = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._spent_s += time.perf_counter() - self._start_s
        self.advance()
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Learner)
        assert isinstance(trainer.strategy, DDPStrategy)
        loss, accuracy, most = module.evaluate(sent_bytes(trainer.strategy, trainer.global_step))
        self.points.append(Point(trainer.global_step, self._spent_s, 1e-6 * most, loss, accuracy))


def train_measured(
    make_trainer: Callable[[list[Any]], Trainer], learner: Learner, every: int, advance: Callable[[], object]
) -> list[Point]:
    """Train to the end, on all processes at once; return the same points on each, but for the seconds.

    Args:
        make_trainer: returns a Trainer with these callbacks.
        learner: what is trained.
        every: steps between two evaluations.
        advance: called after each step.
    """
    measure = Measure(every, advance)
    with quiet():
        trainer = make_trainer([measure])
        with fit_refusals(trainer):
            trainer.fit(learner)
    return measure.points


def write_record(run: RunFolder, name: str, processes: int, points: list[Point]) -> None:
    """Keep what was measured under a name, for a run that goes on later."""
    path = run.path / "contestants" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump({"processes": processes, "points": points}, file)


def read_record(run: RunFolder, name: str) -> dict[str, Any]:
    """Read what `write_record` wrote."""
    kept = json.loads((run.path / "contestants" / f"{name}.json").read_text(encoding="utf-8"))
    return {**kept, "points": [Point(*of) for of in kept["points"]]}
