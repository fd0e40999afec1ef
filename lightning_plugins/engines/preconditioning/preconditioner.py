"""``GradientPreconditioner``: second-order directions in a plain PyTorch loop, in three lines.

    preconditioner = GradientPreconditioner(model, "kfac")          # attach, before torch.compile
    for inputs, targets in data:
        loss = functional.cross_entropy(model(inputs), targets)
        preconditioner.observe(loss)                                # before backward
        loss.backward()
        preconditioner.precondition(optimizer)                      # rewrites .grad, before the optimizer reads it
        optimizer.step(); optimizer.zero_grad()

It holds no mathematics: the methods do (``methods/``), over layers that say what their rows are (``layers.py``), watched by taps
(``taps.py``). It decides when each task of a block runs, and on which rank.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.gradients import read_gradient, write_gradient
from lightning_plugins.engines.preconditioning.kronecker import KroneckerFactors
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
from lightning_plugins.engines.preconditioning.options import check_method, split_options
from lightning_plugins.engines.preconditioning.plan import Assignment, Plan, make_plan
from lightning_plugins.engines.preconditioning.replaying import Closure, Replayer
from lightning_plugins.engines.preconditioning.sharing import Sharing
from lightning_plugins.engines.preconditioning.stopwatch import Stopwatch
from lightning_plugins.engines.preconditioning.taps import Taps

STATE_VERSION = 1


@dataclass(eq=False)
class _Slot:
    """A block, what it preconditions, and where it stands in its schedule.

    Attributes:
        layers: that the block sees; of a method that looks at gradients alone none, and ``parameters`` has one.
        steps: optimizer steps so far.
        folded: whether its running averages hold anything.
        seen: whether a tap ever brought something.
        fresh: whether this step brought something.
    """

    name: str
    entry: MethodEntry
    block: Any
    layers: tuple[Layer, ...]
    parameters: tuple[nn.Parameter, ...]
    steps: int = 0
    folded: bool = False
    seen: bool = False
    fresh: bool = False

    def gradients(self) -> list[Tensor]:
        """Return ``w_BOI`` per layer, or the parameter's own gradient."""
        if not self.layers:
            return [read_gradient(self.parameters[0])]
        return [layer.gradient() for layer in self.layers]

    def write(self, directions: Sequence[Tensor]) -> None:
        """Copy directions over the gradients."""
        if not self.layers:
            write_gradient(self.parameters[0], directions[0])
        for layer, direction in zip(self.layers, directions, strict=False):
            layer.write(direction)


class GradientPreconditioner:
    """Collects curvature while a module trains, and rewrites its gradients.

    Args:
        module: whose gradients are rewritten; attach before ``torch.compile``, whose code ignores later hooks.
        method: name in ``METHODS``.
        group: process group whose ranks train replicas (DDP) or shards (FSDP2); None is a single process.
        options: those of :class:`~lightning_plugins.engines.preconditioning.options.Options`, and the method's own.

    Attributes:
        table: an :class:`~lightning_plugins.engines.preconditioning.plan.Assignment` per parameter: what preconditions it, or why
            nothing does.
        nonfinite_batches: steps whose observations held NaN or infinity and were left out of the averages.
        stopwatch: time of ``observe``, ``taps`` (what they bring within the training's backward passes), ``precondition`` and, as
            a part of it, ``refresh``.

    Raises:
        InputError: for an unknown name or option, a value out of range, or a module with nothing to precondition.
    """

    def __init__(
        self, module: nn.Module, method: str = "kfac", *, group: dist.ProcessGroup | None = None, **options: Any
    ) -> None:
        self.method = method
        self.options, settings = split_options(method, options)
        entry, self.fisher = check_method(method, self.options)
        self.damping = entry.damping if self.options.damping is None else self.options.damping
        self.nonfinite_batches = 0
        plan = make_plan(module, method, METHODS, self.options.norms, self.options.ignore)
        self.table: list[Assignment] = plan.table
        self._slots = self._build(plan, entry, settings)
        self._slot_of = {id(layer): slot for slot in self._slots for layer in slot.layers}
        self.sharing = Sharing(group, self.options.worker_fraction, [slot.block.refresh_cost for slot in self._slots])
        if entry.couples_examples and self.sharing.ranks > 1:
            raise InputError(
                f"{method} couples all examples of a step and needs them in a single process, got {self.sharing.ranks} ranks; "
                "kfac, ekfac, unit and diag add up over ranks"
            )
        device = self._slots[0].parameters[0].device
        self._generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(self.options.seed)
        if any(isinstance(p, DTensor) for slot in self._slots for p in slot.parameters):
            _refuse_shards(method, entry, self.fisher)
        self.stopwatch = Stopwatch(device)
        self._watches_layers = not entry.gradient_only
        self._loss: Loss | None = None  # of the backward pass that is being watched
        self._terms = 0.0  # of the losses of this step, on all ranks
        self._in_pass: set[int] = set()  # slots that received something in this pass
        self._passes: list[tuple[float, set[int]]] = []  # terms of earlier passes, and slots that hold sums of them
        self._unobserved = {id(slot) for slot in self._slots}  # that stepped after the last observed loss
        self._count_inputs = True
        self._clip_factor: Tensor | None = None
        self.taps = Taps([(tapped, layer) for tapped, layer, _ in plan.layers], self._receive)
        self._replayer = self._make_replayer(module, plan) if entry.replays else None
        self._arm()

    def __repr__(self) -> str:
        options = self.options
        return (
            f"GradientPreconditioner({self.method!r}, damping={self.damping}, factor_every={options.factor_every}, "
            f"inverse_every={options.inverse_every}, fisher={self.fisher!r})"
        )

    def observe(self, loss: Tensor, logits: Tensor | None = None) -> None:
        """Prepare for the backward pass of ``loss``, which comes next; once per micro-batch.

        Args:
            loss: the scalar that ``backward`` will be called on, divided and scaled as it is.
            logits: the prediction, where the form of the loss was named with ``loss=``.

        Raises:
            InputError: if the Fisher type needs a form of loss that this one has not, or the last step waits for ``replay``.
        """
        if not self.taps.armed:
            return
        with self.stopwatch.running("observe"):
            self._finish_pass()
            if self._replayer is not None:
                self._replayer.observed()
            self._forget_zeroed()
            self._unobserved.clear()
            if self.fisher in ("mc", "exact"):
                self._observe_prediction(loss, logits)
                return
            self._loss = read_loss(loss, self.options.reduction)
            self.taps.receiving = True

    def precondition(self, optimizer: Optimizer | None = None, *, gradient_scale: float = 1.0) -> None:
        """Rewrite the gradients in place.

        Args:
            optimizer: whose parameters' gradients are rewritten; gives ``kl_clip`` its learning rate. None is all parameters.
            gradient_scale: what the gradients are still multiplied by (a gradient scaler that a fused optimizer undoes itself).

        Raises:
            InputError: if curvature was due in this step and ``observe`` was not called.
        """
        with self.stopwatch.running("precondition"):
            self._precondition(optimizer, gradient_scale)

    def _precondition(self, optimizer: Optimizer | None, gradient_scale: float) -> None:
        self._finish_pass()
        slots = [slot for slot in self._slots_of(optimizer) if all(p.grad is not None for p in slot.parameters)]
        gradients = {slot: slot.gradients() for slot in slots}
        if gradient_scale != 1.0:
            gradients = {slot: [gradient / gradient_scale for gradient in given] for slot, given in gradients.items()}
        due = [slot for slot in slots if self._due(slot, self.options.factor_every)]
        if self._watches_layers:
            self._fold_observations(due)
        else:
            gradients = self._finite(gradients)
            self._fold_gradients([slot for slot in due if slot in gradients], gradients)
        with self.stopwatch.running("refresh"):
            self._refresh([slot for slot in slots if self._due(slot, self.options.inverse_every)])
        self._correct([slot for slot in due if slot.fresh and slot.entry.corrected])
        self._write(gradients, optimizer, gradient_scale)
        self._end_step(slots)

    def replay(self, *closures: Closure) -> None:
        """Show the batch of the last step once more, after ``optimizer.step()``, to methods that compare; others ignore it.

        No ``.grad``, no buffer and no random number generator is left changed.

        Args:
            closures: one per micro-batch, in their order; each computes the loss that was observed, of the same batch.

        Raises:
            InputError: if the closures are not as many as the micro-batches.
        """
        if self._replayer is not None:
            self.nonfinite_batches += not self._replayer.run(closures, self.damping)

    def detach(self) -> None:
        """Leave the module without a hook of ours."""
        self.taps.remove()
        if self._replayer is not None:
            self._replayer.remove()

    def metrics(self) -> dict[str, float]:
        """Return what to log: damping, clip factor, and counts of what went wrong and was got over."""
        troubles = [slot.block.trouble for slot in self._slots]
        return {
            "damping": self.damping,
            "clip_factor": 1.0 if self._clip_factor is None else float(self._clip_factor),
            "nonfinite_batches_count": float(self.nonfinite_batches),
            "unseen_layers_count": float(sum(not slot.folded for slot in self._slots) if self._watches_layers else 0),
            "doubled_dampings_count": float(sum(trouble.doubled_ridges for trouble in troubles)),
            "kept_inverses_count": float(sum(trouble.kept_inverses for trouble in troubles)),
        }

    def silent(self) -> list[str]:
        """Return the layers that were preconditioned at least once and whose taps never brought anything.

        Their parameters had gradients, so something calls the weights past the module, or runs code compiled before the taps.
        """
        return [slot.name for slot in self._slots if self._watches_layers and slot.steps and not slot.seen]

    def traces(self) -> dict[str, float]:
        """Return the trace of every block's curvature, by layer; of methods without Kronecker factors nothing."""
        factors = {slot.name: getattr(slot.block, "factors", None) for slot in self._slots if slot.folded}
        return {name: float(of.trace()) for name, of in factors.items() if isinstance(of, KroneckerFactors)}

    def state_dict(self) -> State:
        """Return the whole state, of tensors and plain values; loading it continues with the same bits.

        No collectives are called. Where ranks share inverses out (``worker_fraction`` below 1), each returns its own alone, and
        after loading every inverse is refreshed at the first step.
        """
        return {
            "version": STATE_VERSION,
            "method": self.method,
            "fisher": self.fisher,
            "complete": self.sharing.workers == self.sharing.ranks,
            "generator": self._generator.get_state(),
            "nonfinite_batches": self.nonfinite_batches,
            "blocks": [
                {
                    "name": slot.name,
                    "shapes": [list(parameter.shape) for parameter in slot.parameters],
                    "steps": slot.steps,
                    "folded": slot.folded,
                    "state": slot.block.state_dict(),
                }
                for slot in self._slots
            ],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state.

        Raises:
            InputError: if it is of another method or module; names the first layer that differs.
        """
        self._check_state(state)
        for slot, saved in zip(self._slots, state["blocks"], strict=True):
            slot.steps, slot.folded, slot.seen = saved["steps"], saved["folded"], saved["folded"]
            slot.block.load_state_dict(saved["state"], slot.parameters[0].device)
        self._refresh_all = not state["complete"]
        self._generator.set_state(state["generator"].cpu())
        self.nonfinite_batches = state["nonfinite_batches"]
        self._arm()

    def _check_state(self, state: State) -> None:
        if (state["method"], state["fisher"]) != (self.method, self.fisher):
            raise InputError(
                f"the checkpoint holds {state['method']} with fisher={state['fisher']!r} and this preconditioner is "
                f"{self.method} with fisher={self.fisher!r}; build it with the checkpoint's method, or start without its state"
            )
        theirs = [(saved["name"], saved["shapes"]) for saved in state["blocks"]]
        ours = [(slot.name, [list(parameter.shape) for parameter in slot.parameters]) for slot in self._slots]
        for index in range(max(len(ours), len(theirs))):
            saved, own = (side[index] if index < len(side) else ("nothing", "") for side in (theirs, ours))
            if saved != own:
                raise InputError(
                    f"the checkpoint is of another model: it has layer {saved[0]} {saved[1]} where this one has {own[0]} {own[1]}"
                    "; load the checkpoint of this model, or start without its state"
                )

    # Building and scheduling

    def _build(self, plan: Plan, entry: MethodEntry, settings: Any) -> list[_Slot]:
        if entry.gradient_only:
            return [
                _Slot(name, entry, entry.make(parameter, settings), (), (parameter,)) for name, parameter, _ in plan.parameters
            ]
        slots = []
        layers = {id(layer): (layer, chosen) for _, layer, chosen in plan.layers}.values()
        joint = tuple(layer for layer, chosen in layers if chosen == self.method) if entry.joint else ()
        if joint:
            every = tuple(parameter for layer in joint for parameter in layer.parameters)
            slots.append(_Slot(self.method, entry, entry.make(joint, settings, self.fisher), joint, every))
        for layer, chosen in layers:
            if layer in joint:
                continue
            used = METHODS[chosen]
            own = settings if chosen == self.method else used.settings()
            fisher = self.fisher if self.fisher in used.fishers else used.fishers[0]
            slots.append(_Slot(layer.name, used, used.make(layer, own, fisher), (layer,), layer.parameters))
        return slots

    def _make_replayer(self, module: nn.Module, plan: Plan) -> Replayer:
        replayed = [(tapped, layer) for tapped, layer, chosen in plan.layers if METHODS[chosen].replays]
        blocks = {id(layer): self._slot_of[id(layer)].block for _, layer in replayed}
        return Replayer(module, replayed, blocks, self.sharing, self.options.reduction)

    def _slots_of(self, optimizer: Optimizer | None) -> list[_Slot]:
        if optimizer is None:
            return self._slots
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [slot for slot in self._slots if all(id(parameter) in held for parameter in slot.parameters)]

    def _due(self, slot: _Slot, every: int) -> bool:
        return slot.steps % every == 0 or slot.steps < self.options.warmup_steps

    def _arm(self) -> None:
        """Tap the next forward passes only where some slot wants to see them."""
        self.taps.armed = self._watches_layers and any(self._due(slot, self.options.factor_every) for slot in self._slots)
        self.taps.receiving = False

    # Observing

    def _receive(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """The sink of the taps: called within a backward pass, for every call of a layer."""
        slot = self._slot_of[id(layer)]
        slot.seen = True
        if not self._due(slot, self.options.factor_every):
            return
        # The extra passes of a prediction run within `observe`, which is timed as a whole.
        with nullcontext() if self.fisher in ("mc", "exact") else self.stopwatch.running("taps"):
            self._accumulate(slot, layer, x, gradient)

    def _accumulate(self, slot: _Slot, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        assert self._loss is not None
        if self._loss.terms is None:
            self._loss.terms = float(layer.output_gradients(gradient).shape[1])
        self._in_pass.add(id(slot))
        if self.fisher == "exact" and slot.entry.per_example and METHODS[self.method].per_example:
            check_positions_apart(self._loss, layer.name, len(x))
        if self._count_inputs:
            slot.block.accumulate_inputs(layer, x)
        scale = 1.0 if self.fisher in ("mc", "exact") else self._loss.scale(self._loss.terms)
        slot.block.accumulate_output_gradients(layer, x, gradient, scale)

    def _finish_pass(self) -> None:
        for slot in self._slots:
            if id(slot) in self._in_pass:
                slot.block.finish_pass()
        if self._in_pass:
            assert self._loss is not None
            assert self._loss.terms is not None
            self._passes.append((self._loss.terms, self._in_pass))
        self._in_pass = set()
        self.taps.receiving = False

    def _forget_zeroed(self) -> None:
        """Drop sums of backward passes whose gradients were dropped, too: another optimizer's loss went through these layers."""
        held = set().union(*(slots for _, slots in self._passes))
        self._forget([slot for slot in self._slots if id(slot) in held and all(p.grad is None for p in slot.parameters)])

    def _forget(self, slots: Sequence[_Slot]) -> None:
        dropped = {id(slot) for slot in slots}
        for slot in slots:
            slot.block.clear()
        self._passes = [(terms, held - dropped) for terms, held in self._passes if held - dropped]

    def _observe_prediction(self, loss: Tensor, logits: Tensor | None) -> None:
        """Run the extra backward passes of ``mc`` and ``exact``, which touch no ``.grad``; the training's own is not watched."""
        form = self.options.loss
        if form is not None and logits is None:
            raise InputError(f"loss={form!r} was named, so observe needs the logits: observe(loss, logits)")
        self._loss = given_loss(form, logits) if form is not None and logits is not None else read_loss(loss)
        if self.fisher == "mc":
            seeds = sampled_seeds(self._loss, self.options.samples, self._generator)
        else:
            seeds = exact_seeds(self._loss, positions_apart=METHODS[self.method].per_example)
        parameters = [parameter for slot in self._slots for parameter in slot.parameters]
        for index, seed in enumerate(seeds):
            self.taps.receiving, self._count_inputs = True, index == 0
            counted = len(self._passes)
            assert self._loss.logits is not None
            torch.autograd.grad(self._loss.logits, parameters, seed, retain_graph=True, allow_unused=True)
            self._finish_pass()
            if self.fisher == "exact" and index:  # the columns of one Hessian belong to the same terms
                del self._passes[counted:]
        self._count_inputs = True

    # The tasks of a step

    def _fold_observations(self, due: list[_Slot]) -> None:
        """Reduce over ranks, and take into the running averages what is finite."""
        if not due:
            return
        if any(id(slot) in self._unobserved for slot in due):
            raise InputError("curvature is due in this step and no loss was seen; call observe(loss) before loss.backward()")
        for symmetric in (True, False):
            sums = [tensor for slot in due if slot.entry.symmetric_sums is symmetric for tensor in slot.block.pending()]
            self.sharing.add(sums, symmetric=symmetric)
        ours = {id(slot) for slot in due}
        own_terms = sum(terms for terms, held in self._passes if held & ours)
        numbers = torch.tensor([own_terms, *(float(slot.block.rows) for slot in due)], dtype=torch.float64)
        numbers = numbers.to(due[0].parameters[0].device)
        self.sharing.add([numbers])
        finite = torch.stack([_all_finite(_telling(slot)) for slot in due])
        terms, *counted = torch.cat([numbers, finite.to(numbers)]).tolist()  # the one value that the host waits for
        clean = all(counted[len(due) :])  # of a bad batch no layer is trusted
        for slot, rows in zip(due, counted[: len(due)], strict=True):
            slot.fresh = clean and rows > 0 and terms > 0
            if slot.fresh:
                slot.block.fold(int(rows), terms)
                slot.folded = True
        self._terms = terms
        self.nonfinite_batches += not clean

    def _finite(self, gradients: dict[_Slot, list[Tensor]]) -> dict[_Slot, list[Tensor]]:
        """Return the gradients, or none where one is not finite: averages and momentum move together or not at all."""
        if not gradients:
            return gradients
        finite = bool(torch.stack([_square_is_finite(given[0]) for given in gradients.values()]).all())
        self.nonfinite_batches += not finite
        return gradients if finite else {}

    def _fold_gradients(self, due: list[_Slot], gradients: dict[_Slot, list[Tensor]]) -> None:
        for slot in due:
            slot.block.fold(gradients[slot][0])
            slot.fresh = slot.folded = True

    def _refresh(self, due: list[_Slot]) -> None:
        """Refresh on the owners, and send what they made to the ranks that keep it."""
        for index, slot in enumerate(self._slots):
            if not slot.folded or (slot not in due and not self._refresh_all):
                continue
            if not self._watches_layers:
                slot.block.refresh()
                continue
            if self.sharing.owns(index):
                slot.block.refresh(self.damping)
            if self.sharing.workers > 1 and self.sharing.works_on(index):
                self.sharing.share_derived(index, slot.block.derived())
        self._refresh_all = False

    _refresh_all = False  # after a state that held the inverses of one rank alone

    def _correct(self, due: list[_Slot]) -> None:
        """Take the sums that the refreshed bases allow."""
        self.sharing.add([tensor for slot in due for tensor in slot.block.corrections()])
        for slot in due:
            slot.block.fold_corrections(self._terms)

    def _write(self, gradients: dict[_Slot, list[Tensor]], optimizer: Optimizer | None, gradient_scale: float) -> None:
        """Precondition, scale, and copy over the gradients; a layer of which nothing was ever seen keeps its own."""
        directions: dict[_Slot, list[Tensor]] = {}
        for index, slot in enumerate(self._slots):
            if slot not in gradients or not slot.folded:
                continue
            given = gradients[slot]
            if not self._watches_layers:
                directions[slot] = [slot.block.direction(given[0])]
                continue
            if self.sharing.works_on(index):
                directions[slot] = [direction.contiguous() for direction in slot.block.directions(given)]
            else:
                directions[slot] = [
                    torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device) for gradient in given
                ]
            self.sharing.share_directions(index, directions[slot])
        self._clip_factor = self._kl_clip_factor(gradients, directions, optimizer)
        for slot, made in directions.items():
            if self.options.match_norm:
                made = [_with_norm_of(direction, gradient) for direction, gradient in zip(made, gradients[slot], strict=True)]
            factor = gradient_scale if self._clip_factor is None else self._clip_factor * gradient_scale
            slot.write(made if isinstance(factor, float) and factor == 1.0 else [direction * factor for direction in made])

    def _kl_clip_factor(
        self, gradients: dict[_Slot, list[Tensor]], directions: dict[_Slot, list[Tensor]], optimizer: Optimizer | None
    ) -> Tensor | None:
        """Return ``min(1, sqrt(kl_clip / sum lr^2 <P, V>))``, on the device."""
        if self.options.kl_clip is None or not directions:
            return None
        if optimizer is None:
            raise InputError("kl_clip needs the learning rate: precondition(optimizer)")
        rates = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
        products = [
            rates[id(slot.parameters[0])] ** 2 * (direction * gradient).sum().float()
            for slot, made in directions.items()
            for direction, gradient in zip(made, gradients[slot], strict=True)
        ]
        return (self.options.kl_clip / torch.stack(products).sum().clamp_min(1e-30)).sqrt().clamp_max(1.0)

    def _end_step(self, slots: list[_Slot]) -> None:
        if self._replayer is not None:
            self._replayer.expect([slot.block for slot in slots if slot.fresh and slot.entry.replays])
        for slot in slots:
            slot.steps += 1
            slot.fresh = False
        if self._watches_layers:
            self._forget(slots)
            self._unobserved.update(id(slot) for slot in slots)
        self._loss = None
        self._arm()


def _telling(slot: _Slot) -> list[Tensor]:
    """Return what tells whether a step's sums are finite: of sums of ``x x^T`` the diagonals, which bound the other entries."""
    sums: list[Tensor] = slot.block.pending()
    return [s.diagonal(dim1=-2, dim2=-1) if slot.entry.symmetric_sums and s.ndim > 1 else s for s in sums]


def _refuse_shards(method: str, entry: MethodEntry, fisher: str) -> None:
    """Refuse extra backward passes: FSDP2 frees the whole parameters that they would differentiate by."""
    if fisher in ("mc", "exact") or entry.replays:
        what = f"fisher={fisher!r}" if fisher in ("mc", "exact") else method
        raise InputError(f"{what} needs whole parameters and these are sharded; use DDP, or kfac with fisher='empirical'")


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return one bool without a copy of the tensors: a sum is finite where all its terms are."""
    return torch.stack([tensor.sum(dtype=torch.float64) for tensor in tensors]).sum().isfinite()


def _square_is_finite(gradient: Tensor) -> Tensor:
    """Return whether second moments of a gradient can hold it: float32 has a place for 1e20 and none for its square."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=statistics_dtype(gradient.dtype))
    return norm.isfinite()


def _with_norm_of(direction: Tensor, gradient: Tensor) -> Tensor:
    return direction * (gradient.norm() / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny))
