"""Steppers, and the timing of their steps in turn: see ``preconditioning.py``."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_plugins.engines.preconditioning import METHODS, GradientPreconditioner

LEARNING_RATE = 1e-3
Batch = tuple[Tensor, Tensor]


class Stepper(Protocol):
    """One variant with a net of its own.

    Attributes:
        net: whose parameters it changes.
        forward: what computes the logits: the net, compiled or not.
        holds: whatever keeps its state alive.
        kind: of the last step; steps of one kind do the same work.
    """

    net: nn.Module
    forward: Callable[[Tensor], Tensor]
    holds: list[Any]
    kind: object

    def step(self, inputs: Tensor, targets: Tensor, watch: Callable[[], None]) -> Tensor:
        """Take a whole training step, calling ``watch`` once its backward pass is done, and return the loss."""


class OptimizerStepper:
    """Plain training with any optimizers of PyTorch's interface, whose work repeats every ``period`` steps."""

    def __init__(self, net: nn.Module, *optimizers: torch.optim.Optimizer, period: int = 1) -> None:
        self.net = net
        self.forward: Callable[[Tensor], Tensor] = net
        self.optimizers = optimizers
        self.holds: list[Any] = list(optimizers)
        self.period = period
        self.steps = 0
        self.kind: object = None

    def step(self, inputs: Tensor, targets: Tensor, watch: Callable[[], None]) -> Tensor:
        self.net.zero_grad()
        loss = functional.cross_entropy(self.forward(inputs), targets)
        loss.backward()
        watch()
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        # HeavyBall says itself whether it refreshed; the others count steps from 0 or 1.
        self.kind = getattr(self.optimizers[0], "_is_preconditioning", min(self.steps % self.period, 2))
        return loss.detach()


class OurStepper:
    """A training step with one of our preconditioners before plain SGD."""

    def __init__(self, net: nn.Module, method: str, options: dict[str, Any]) -> None:
        self.net = net
        self.forward: Callable[[Tensor], Tensor] = net
        self.preconditioner = GradientPreconditioner(net, method, warmup_steps=0, **options)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
        self.replays = METHODS[method].replays
        self.holds: list[Any] = [self.preconditioner]
        self.intervals = (options.get("factor_every", 1), options.get("inverse_every", 1))
        self.steps = 0
        self.kind: object = None

    def step(self, inputs: Tensor, targets: Tensor, watch: Callable[[], None]) -> Tensor:
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.forward(inputs), targets)
        self.preconditioner.observe(loss)
        loss.backward()
        watch()
        self.preconditioner.precondition(self.optimizer)
        self.optimizer.step()
        if self.replays:
            self.preconditioner.replay(lambda: functional.cross_entropy(self.forward(inputs), targets))
        # What is put off to the first use after a refresh makes the step after it a kind of its own.
        self.kind = tuple(min(self.steps % every, 2) for every in self.intervals)
        self.steps += 1
        return loss.detach()


@dataclass
class Variant:
    """A stepper that runs, and what was measured of it.

    Attributes:
        period: steps after which its work repeats.
        loss: of the last step.
        warm_s: median time of a step of the warm-up.
        wanted: steps that are to be measured.
        times_s: by kind of step: by the clock, and of the processor.
    """

    name: str
    library: str
    stepper: Stepper
    settings: str = "defaults"
    period: int = 1
    note: str = ""
    state_bytes: int = 0
    loss: float = 0.0
    warm_s: float = 0.0
    wanted: int = 1
    times_s: dict[object, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def run(self, batch: Batch, watch: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """Take a step and return its time in seconds: by the clock, and of the processor."""
        start_s, start_processor_s = time.perf_counter(), time.process_time()
        loss = self.stepper.step(*batch, watch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken_s = time.perf_counter() - start_s, time.process_time() - start_processor_s
        self.loss = float(loss)
        return taken_s

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Take steps that do not count, looking at what is held."""

        def look() -> None:
            self.state_bytes = max(self.state_bytes, held_bytes(self.stepper.holds, self.stepper.net))

        self.run(batches[0], look)
        look()
        self.warm_s = statistics.median(self.run(batch)[0] for batch in batches[1:4])

    def figures(self) -> dict[str, float]:
        """Return milliseconds: the mean of the kinds' medians by the clock and of the processor, and the plain mean."""
        count = sum(len(times_s) for times_s in self.times_s.values())

        def typical_ms(clock: int) -> float:
            medians = ((len(times_s), statistics.median(taken[clock] for taken in times_s)) for times_s in self.times_s.values())
            return 1e3 * sum(number * median_s for number, median_s in medians) / count

        mean_ms = 1e3 * statistics.fmean(taken[0] for times_s in self.times_s.values() for taken in times_s)
        return {"ms": typical_ms(0), "processor_ms": typical_ms(1), "mean_ms": mean_ms, "steps": count}


def held_bytes(roots: Sequence[Any], net: nn.Module) -> int:
    """Return the bytes of all tensors that can be reached, each storage once, without the net's own and their gradients."""
    own = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None)]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    visited, total, waiting = set(), 0, list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in visited or isinstance(item, (nn.Module, type, str, int, float)):
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            if item.untyped_storage().data_ptr() not in known:
                known.add(item.untyped_storage().data_ptr())
                total += item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting.extend([*item.keys(), *item.values()])
        elif isinstance(item, (list, tuple, set)):
            waiting.extend(item)
        elif not callable(item) or not hasattr(item, "__code__"):
            waiting.append(getattr(item, "__dict__", {}))
    return total


def alternate(variants: Sequence[Variant], batches: Sequence[Batch], rounds: int) -> None:
    """Let all variants step in turn, in an order that is shuffled every round, each as often as its ``wanted`` says."""
    order, shuffle = list(variants), random.Random(0)
    for index in range(rounds):
        shuffle.shuffle(order)
        for variant in order:
            if index * variant.wanted // rounds < (index + 1) * variant.wanted // rounds:
                taken_s = variant.run(batches[index % len(batches)])
                variant.times_s[variant.stepper.kind].append(taken_s)
