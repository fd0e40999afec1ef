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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State, statistics_dtype
from lightning_plugins.engines.preconditioning.kronecker import KroneckerFactors
from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.observing import Observer
from lightning_plugins.engines.preconditioning.options import check_method, split_options
from lightning_plugins.engines.preconditioning.plan import Assignment, Plan, make_plan
from lightning_plugins.engines.preconditioning.replaying import Closure, Replayer
from lightning_plugins.engines.preconditioning.sharing import Sharing
from lightning_plugins.engines.preconditioning.slots import Slot, build_slots, check_same_model
from lightning_plugins.engines.preconditioning.stopwatch import Stopwatch

STATE_VERSION = 1


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
        self._slots = build_slots(plan, method, self.fisher, settings)
        self.sharing = Sharing(group, self.options.worker_fraction, [slot.block.refresh_cost for slot in self._slots])
        if entry.couples_examples and self.sharing.ranks > 1:
            raise InputError(
                f"{method} couples all examples of a step and needs them in a single process, got {self.sharing.ranks} ranks; "
                "kfac, ekfac, unit and diag add up over ranks"
            )
        if any(isinstance(p, DTensor) for slot in self._slots for p in slot.parameters):
            _refuse_shards(method, entry, self.fisher)
        self.stopwatch = Stopwatch(self._slots[0].parameters[0].device)
        self._watches_layers = not entry.gradient_only
        self._observer = Observer(plan, self._slots, method, self.fisher, self.options, self.stopwatch)
        self.taps = self._observer.taps
        self._replayer = self._make_replayer(module, plan) if entry.replays else None
        self._terms = 0.0  # of the losses of this step, on all ranks
        self._refresh_all = False  # after a state that held the inverses of one rank alone
        self._clip_factor: Tensor | None = None
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
            if self._replayer is not None:
                self._replayer.observed()
            self._observer.observe(loss, logits)

    def precondition(self, optimizer: Optimizer | None = None, *, gradient_scale: float = 1.0) -> None:
        """Rewrite the gradients in place.

        Args:
            optimizer: whose parameters' gradients are rewritten; gives ``kl_clip`` its learning rate. None is all parameters.
            gradient_scale: what the gradients are still multiplied by (a gradient scaler that a fused optimizer undoes itself).

        Raises:
            InputError: if curvature was due in this step and ``observe`` was not called.
        """
        device_type = self._slots[0].parameters[0].device.type
        with self.stopwatch.running("precondition"), torch.autocast(device_type, enabled=False):
            self._precondition(optimizer, gradient_scale)

    def _precondition(self, optimizer: Optimizer | None, gradient_scale: float) -> None:
        self._observer.finish_pass()
        slots = [slot for slot in self._slots_of(optimizer) if slot.has_gradients()]
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

        The tensors are live, as those of torch's optimizers are: copy them to go back to them within the same process.

        No collectives are called. Where ranks share inverses out (``worker_fraction`` below 1), each returns its own alone, and
        after loading every inverse is refreshed at the first step.
        """
        return {
            "version": STATE_VERSION,
            "method": self.method,
            "fisher": self.fisher,
            "complete": self.sharing.workers == self.sharing.ranks,
            "generator": self._observer.generator.get_state(),
            "nonfinite_batches": self.nonfinite_batches,
            "blocks": [slot.state_dict() for slot in self._slots],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state.

        Raises:
            InputError: if it is of another method or module; names the first layer that differs.
        """
        if (state["method"], state["fisher"]) != (self.method, self.fisher):
            raise InputError(
                f"the checkpoint holds {state['method']} with fisher={state['fisher']!r} and this preconditioner is "
                f"{self.method} with fisher={self.fisher!r}; build it with the checkpoint's method, or start without its state"
            )
        check_same_model(self._slots, state["blocks"])
        for slot, saved in zip(self._slots, state["blocks"], strict=True):
            slot.load_state_dict(saved)
        self._refresh_all = not state["complete"]
        self._observer.generator.set_state(state["generator"].cpu())
        self.nonfinite_batches = state["nonfinite_batches"]
        self._arm()

    def _make_replayer(self, module: nn.Module, plan: Plan) -> Replayer:
        replayed = [(tapped, layer) for tapped, layer, chosen in plan.layers if METHODS[chosen].replays]
        blocks = {id(layer): slot.block for slot in self._slots for layer in slot.layers if slot.entry.replays}
        return Replayer(module, replayed, blocks, self.sharing, self.options.reduction)

    def _slots_of(self, optimizer: Optimizer | None) -> list[Slot]:
        if optimizer is None:
            return self._slots
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        chosen = []
        for slot in self._slots:
            here = [id(parameter) in held for parameter in slot.parameters]
            if all(here):
                chosen.append(slot)
            elif any(here):
                raise InputError(
                    f"{slot.name} is preconditioned as a whole, and the optimizer holds {sum(here)} of its {len(here)} "
                    "parameters; give all of them to one optimizer, or choose a method that takes less together: layer, not full"
                )
        return chosen

    def _due(self, slot: Slot, every: int) -> bool:
        return slot.steps % every == 0 or slot.steps < self.options.warmup_steps

    def _arm(self) -> None:
        due = [slot for slot in self._slots if self._due(slot, self.options.factor_every)] if self._watches_layers else []
        self._observer.expect(due)

    # The tasks of a step

    def _fold_observations(self, due: list[Slot]) -> None:
        """Reduce over ranks, and take into the running averages what is finite."""
        if not due:
            return
        own_terms = self._observer.terms_of(due)
        for symmetric in (True, False):
            sums = [tensor for slot in due if slot.entry.symmetric_sums is symmetric for tensor in slot.block.pending()]
            self.sharing.add(sums, symmetric=symmetric)
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

    def _finite(self, gradients: dict[Slot, list[Tensor]]) -> dict[Slot, list[Tensor]]:
        """Return the gradients, or none where one is not finite: averages and momentum move together or not at all."""
        if not gradients:
            return gradients
        finite = bool(torch.stack([_square_is_finite(given[0]) for given in gradients.values()]).all())
        self.nonfinite_batches += not finite
        return gradients if finite else {}

    def _fold_gradients(self, due: list[Slot], gradients: dict[Slot, list[Tensor]]) -> None:
        for slot in due:
            slot.block.fold(gradients[slot][0])
            slot.fresh = slot.folded = True

    def _refresh(self, due: list[Slot]) -> None:
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

    def _correct(self, due: list[Slot]) -> None:
        """Take the sums that the refreshed bases allow."""
        self.sharing.add([tensor for slot in due for tensor in slot.block.corrections()])
        for slot in due:
            slot.block.fold_corrections(self._terms)

    def _write(self, gradients: dict[Slot, list[Tensor]], optimizer: Optimizer | None, gradient_scale: float) -> None:
        """Precondition, scale, and copy over the gradients; a layer of which nothing was ever seen keeps its own."""
        directions: dict[Slot, list[Tensor]] = {}
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
        self, gradients: dict[Slot, list[Tensor]], directions: dict[Slot, list[Tensor]], optimizer: Optimizer | None
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

    def _end_step(self, slots: list[Slot]) -> None:
        if self._replayer is not None:
            self._replayer.expect([slot.block for slot in slots if slot.fresh and slot.entry.replays])
        for slot in slots:
            slot.steps += 1
            slot.fresh = False
        if self._watches_layers:
            self._observer.end_step(slots)
        self._arm()


def _telling(slot: Slot) -> list[Tensor]:
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
