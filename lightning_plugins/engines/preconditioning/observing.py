"""What the passes of a step bring: taps, passes and their terms, and the extra passes of sampled and exact Fisher matrices."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.losses import (
    Loss,
    check_positions_apart,
    exact_seeds,
    given_loss,
    read_loss,
    sampled_seeds,
)
from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.options import Options
from lightning_plugins.engines.preconditioning.plan import Plan
from lightning_plugins.engines.preconditioning.slots import Slot
from lightning_plugins.engines.preconditioning.stopwatch import Stopwatch
from lightning_plugins.engines.preconditioning.taps import Taps


class Observer:
    """Watches the passes of a step, and hands blocks what goes through their layers.

    Several optimizers may share a step: what a pass brought, and the terms of its loss, belong to the blocks that it reached.

    Args:
        plan: layers to tap.
        slots: blocks by layer; those that are not ``due`` receive nothing.
        method: name in ``METHODS``.
        fisher: Fisher type.
        options: form and reduction of the loss, samples and seed.
        stopwatch: takes the time of ``taps``, what they bring within the training's own backward passes.

    Attributes:
        taps: on every layer of the plan.
        generator: of drawn targets.
    """

    def __init__(
        self, plan: Plan, slots: Sequence[Slot], method: str, fisher: str, options: Options, stopwatch: Stopwatch
    ) -> None:
        self.fisher = fisher
        self.options = options
        self.stopwatch = stopwatch
        self._entry = METHODS[method]
        self._slots = slots
        self._slot_of = {id(layer): slot for slot in slots for layer in slot.layers}
        device = slots[0].parameters[0].device
        self.generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(options.seed)
        self._loss: Loss | None = None  # of the pass that is being watched
        self._in_pass: set[Slot] = set()  # that received something in this pass
        self._passes: list[tuple[float, set[Slot]]] = []  # terms of earlier passes, and slots that hold sums of them
        self._unobserved = set(slots)  # that stepped after the last observed loss
        self._due: set[Slot] = set()
        self._count_inputs = True
        self.taps = Taps([(tapped, layer) for tapped, layer, _ in plan.layers], self._receive)

    def expect(self, due: Sequence[Slot]) -> None:
        """Tap the next forward passes for the slots that want to see them, and only if there are any."""
        self._due = set(due)
        self._loss = None
        self.taps.armed, self.taps.receiving = bool(due), False

    def observe(self, loss: Tensor, logits: Tensor | None) -> None:
        """Prepare for the backward pass of ``loss``; see ``GradientPreconditioner.observe``."""
        self.finish_pass()
        self._forget_zeroed()
        self._unobserved.clear()
        if self.fisher in ("mc", "exact"):
            self._observe_prediction(loss, logits)
            return
        self._loss = read_loss(loss, self.options.reduction)
        self.taps.receiving = True

    def finish_pass(self) -> None:
        """Complete the pass that was being watched, if any."""
        for slot in self._in_pass:
            slot.block.finish_pass()
        if self._in_pass:
            assert self._loss is not None
            assert self._loss.terms is not None
            self._passes.append((self._loss.terms, self._in_pass))
        self._in_pass = set()
        self.taps.receiving = False

    def terms_of(self, slots: Sequence[Slot]) -> float:
        """Return the terms of the losses that reached any of some slots in this step, on this rank.

        Raises:
            InputError: if one of them stepped since the last observed loss.
        """
        wanted = set(slots)
        if wanted & self._unobserved:
            raise InputError("curvature is due in this step and no loss was seen; call observe(loss) before loss.backward()")
        return sum(terms for terms, held in self._passes if held & wanted)

    def forget(self, slots: Sequence[Slot]) -> None:
        """Drop what some slots received."""
        dropped = set(slots)
        for slot in slots:
            slot.block.clear()
        self._passes = [(terms, held - dropped) for terms, held in self._passes if held - dropped]

    def end_step(self, slots: Sequence[Slot]) -> None:
        """Note that some slots were preconditioned: what they received is used up."""
        self.forget(slots)
        self._unobserved.update(slots)

    def _forget_zeroed(self) -> None:
        """Drop sums of backward passes whose gradients were dropped, too: another optimizer's loss went through these layers."""
        held = set().union(*(slots for _, slots in self._passes))
        self.forget([slot for slot in self._slots if slot in held and all(p.grad is None for p in slot.parameters)])

    def _receive(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """The sink of the taps: called within a backward pass, for every call of a layer."""
        slot = self._slot_of[id(layer)]
        slot.seen = True
        if slot not in self._due or gradient.numel() == 0:  # an expert may have been given no rows
            return
        # The extra passes of a prediction run within `observe`, which is timed as a whole.
        with nullcontext() if self.fisher in ("mc", "exact") else self.stopwatch.running("taps"):
            self._accumulate(slot, layer, x, gradient)

    def _accumulate(self, slot: Slot, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        assert self._loss is not None
        if self._loss.terms is None:
            self._loss.terms = float(layer.output_gradients(gradient).shape[1])
        self._in_pass.add(slot)
        if self.fisher == "exact" and slot.entry.per_example and self._entry.per_example:
            check_positions_apart(self._loss, layer.name, len(x))
        if self._count_inputs:
            slot.block.accumulate_inputs(layer, x)
        scale = 1.0 if self.fisher in ("mc", "exact") else self._loss.scale(self._loss.terms)
        slot.block.accumulate_output_gradients(layer, x, gradient, scale)

    def _observe_prediction(self, loss: Tensor, logits: Tensor | None) -> None:
        """Run the extra backward passes of ``mc`` and ``exact``, which touch no ``.grad``; the training's own is not watched."""
        form = self.options.loss
        if form is not None and logits is None:
            raise InputError(f"loss={form!r} was named, so observe needs the logits: observe(loss, logits)")
        self._loss = given_loss(form, logits) if form is not None and logits is not None else read_loss(loss)
        if self.fisher == "mc":
            seeds = sampled_seeds(self._loss, self.options.samples, self.generator)
        else:
            seeds = exact_seeds(self._loss, positions_apart=self._entry.per_example)
        parameters = [parameter for slot in self._slots for parameter in slot.parameters if parameter.requires_grad]
        for index, seed in enumerate(seeds):
            self.taps.receiving, self._count_inputs = True, index == 0
            counted = len(self._passes)
            assert self._loss.logits is not None
            torch.autograd.grad(self._loss.logits, parameters, seed, retain_graph=True, allow_unused=True)
            self.finish_pass()
            if self.fisher == "exact" and index:  # the columns of one Hessian belong to the same terms
                del self._passes[counted:]
        self._count_inputs = True
