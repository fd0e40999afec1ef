"""The ranks' side of ``ok_topk_convergence.py``: two tasks, and training with every way to reduce gradients."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn import functional

from lightning_plugins.engines.sparse_allreduce import SparseAllreduceState, sparse_allreduce
from lightning_plugins.engines.sparse_allreduce.rivals import topk_allgather
from lightning_plugins.recipes.comparison_tasks import Batch, Task, character_transformer

DENSITY, MOMENTUM, THRESHOLD_EVERY, POWER_RANK = 0.01, 0.9, 32, 2
DENSE_SHARE, WARM_UP_SHARE = 0.1, 0.1  # of all steps
GLOBAL_BATCH = 32
CLASSES, NOISE = 10, 0.4
OK_TOPK = {"indices": "delta16", "values": "bfloat16", "threshold_every": THRESHOLD_EVERY}

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        task: a name in ``TASKS``.
        method: a name in ``METHODS``.
        seed: of weights and batches.
        rate: peak learning rate.
        steps: optimizer steps.
        watched: whether the conservation of mass is checked at every step.
        evaluations: on the held-out set.
    """

    task: str
    method: str
    seed: int
    rate: float
    steps: int
    watched: bool = False
    evaluations: int = 5


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        losses: on the held-out set, by step.
        accuracies: likewise.
        seconds: of training, evaluations left out, by step.
        mass_errors: by sparse step, largest entry of ``gradients + residuals before - update - residuals after``, over the
            largest of the sum before; of a watched run.
        sent_kb: of rank 0 in a sparse step, where bytes are counted.
    """

    job: Job
    losses: dict[int, float] = field(default_factory=dict)
    accuracies: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    mass_errors: dict[int, float] = field(default_factory=dict)
    sent_kb: float | None = None

    @property
    def mass_error(self) -> float | None:
        """The largest of any step, or None where none was looked at."""
        return max(self.mass_errors.values(), default=None)


def gratings(seed: int) -> Task:
    """Return the classification of coloured gratings by their direction; batches are ``(32, 3, 32, 32)``.

    Phase, wavelength and colour are random, and there is noise, so that no pixel tells anything by itself.

    Args:
        seed: of weights and batches.
    """

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(
                nn.Conv2d(3, 16, 5, stride=2, padding=2),
                nn.ReLU(),
                nn.Conv2d(16, 48, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(48, 64, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(1024, CLASSES),
            )

    def batch(step: int) -> Batch:
        return _gratings(default_rng((0, seed, step)), GLOBAL_BATCH)

    return Task(make, batch, _gratings(default_rng(1), 500), functional.cross_entropy, steps=300)


def _gratings(rng: Generator, count: int) -> Batch:
    labels = rng.integers(CLASSES, size=count)
    angles = labels * math.pi / CLASSES + rng.normal(0.0, 0.06, count)
    waves = 2 * math.pi / rng.uniform(4.0, 9.0, count)
    rows, columns = np.mgrid[:32, :32]
    along = np.cos(angles)[:, None, None] * columns + np.sin(angles)[:, None, None] * rows
    stripes = np.sin(waves[:, None, None] * along + rng.uniform(0, 2 * math.pi, (count, 1, 1)))
    colours = rng.uniform(0.4, 1.0, (count, 3, 1, 1)) * rng.choice((-1.0, 1.0), (count, 3, 1, 1))
    noise = NOISE * rng.standard_normal((count, 3, 32, 32), dtype=np.float32)
    return torch.from_numpy((colours * stripes[:, None]).astype(np.float32) + noise), torch.from_numpy(labels)


def characters(seed: int) -> Task:
    """Return the character transformer of the recipe ``precondition_compare``, with batches of ``GLOBAL_BATCH``."""
    task = character_transformer(seed)

    def batch(step: int) -> Batch:
        inputs, targets = task.batch(step)
        return inputs[:GLOBAL_BATCH], targets[:GLOBAL_BATCH]

    return Task(task.make_module, batch, task.evaluation, task.loss, task.steps)


TASKS = {"gratings_cnn": gratings, "character_transformer": characters}


class Sparse:
    """A reduction with a residual.

    Args:
        elements: of the gradient.
        reduce: with the signature of ``sparse_allreduce``.
        settings: of the state.
        feedback: whether what was not sent waits; else it is thrown away.
        defective: whether the published code's defect is put in: in steps with exact thresholds, nothing that was sent is
            cleared from the residuals.
    """

    def __init__(
        self,
        elements: int,
        reduce: Callable[..., Tensor],
        settings: dict[str, Any],
        feedback: bool = True,
        defective: bool = False,
    ) -> None:
        self.state = SparseAllreduceState(**settings)
        self.acc = torch.zeros(elements)
        self.k = round(DENSITY * elements)
        self.steps = 0
        self._reduce, self._feedback, self._defective = reduce, feedback, defective

    def __call__(self, gradient: Tensor, step: int, watcher: Outcome | None) -> Tensor:
        """Return the sum over the ranks of what was chosen, and tell a watcher of the step."""
        self.acc += gradient
        before = self.acc.clone()
        exact = self.state.due
        update = self._reduce(self.acc, self.k, state=self.state)
        if self._defective and exact:
            self.acc.copy_(before)
        if not self._feedback:
            self.acc.zero_()
        if watcher is not None:
            masses = torch.stack([before.double() - self.acc.double(), before.double()])
            dist.all_reduce(masses)
            error = (masses[0] - update.double()).abs().max() / masses[1].abs().max()
            watcher.mass_errors[step] = float(error)
        self.steps += 1
        return update


METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    f"PowerSGD rank {POWER_RANK}": None,
    "TopkA": {"reduce": topk_allgather, "settings": {}},
    "Ok-Topk, exact": {"settings": {**OK_TOPK, "threshold": "exact"}},
    "Ok-Topk, servo": {"settings": {**OK_TOPK, "threshold": "servo"}},
    "Ok-Topk, reused": {"settings": {**OK_TOPK, "threshold": "reused"}},
    "Ok-Topk without error feedback": {"settings": {**OK_TOPK, "threshold": "servo"}, "feedback": False},
    "Ok-Topk with the published defect": {"settings": {**OK_TOPK, "threshold": "servo"}, "defective": True},
}


def train_all(rank: int, ranks: int, jobs: list[Job]) -> list[Outcome]:
    """Do runs one after another."""
    return [train(rank, ranks, job) for job in jobs]


def train(rank: int, ranks: int, job: Job) -> Outcome:
    """Train in a plain loop; the rate rises over the first tenth of the steps and falls to zero, linearly both."""
    task, outcome = TASKS[job.task](job.seed), Outcome(job)
    module = task.make_module()
    parameters = list(module.parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.SGD(parameters, lr=job.rate, momentum=MOMENTUM)
    warm_up, dense_steps = max(1, round(WARM_UP_SHARE * job.steps)), max(2, round(DENSE_SHARE * job.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (job.steps - step) / (job.steps - warm_up))
    )
    options = METHODS[job.method]
    sparse = None if options is None else Sparse(elements, **{"reduce": sparse_allreduce, **options})
    trained = module
    if job.method.startswith("PowerSGD"):
        trained = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=1000)
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWER_RANK, start_powerSGD_iter=dense_steps)
        trained.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    taken_s, start_s = 0.0, time.perf_counter()
    for step in range(job.steps):
        inputs, targets = (part[rank::ranks] for part in task.batch(step))
        optimizer.zero_grad()
        task.loss(trained(inputs), targets).backward()
        if trained is module:
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
            if sparse is None or step < dense_steps:
                dist.all_reduce(gradient)
            else:
                try:
                    gradient = sparse(gradient, step, outcome if job.watched else None)
                except FloatingPointError:  # on all ranks at once: the run has diverged, and ends as such
                    outcome.losses[job.steps], outcome.accuracies[job.steps] = math.inf, 0.0
                    break
            for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                parameter.grad.copy_(part.view_as(parameter)).div_(ranks)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, job.steps // job.evaluations) == 0 or step + 1 == job.steps:
            taken_s += time.perf_counter() - start_s
            outcome.seconds[step + 1] = taken_s
            outcome.losses[step + 1], outcome.accuracies[step + 1] = evaluate(module, task, rank, ranks)
            start_s = time.perf_counter()
    if sparse is not None:
        outcome.sent_kb = 1e-3 * sparse.state.traffic.total_bytes()[0] / max(1, sparse.steps)
    return outcome


def evaluate(module: nn.Module, task: Task, rank: int, ranks: int) -> tuple[float, float]:
    """Return loss and accuracy on the held-out set, of which each rank looks at its part."""
    inputs, targets = (part[rank::ranks] for part in task.evaluation)
    with torch.no_grad():
        logits = module(inputs)
        sums = torch.tensor(
            [float(task.loss(logits, targets)) * targets.numel(), float((logits.argmax(-1) == targets).sum()), targets.numel()],
            dtype=torch.float64,
        )
    dist.all_reduce(sums)
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])
