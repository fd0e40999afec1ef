"""Slots: the blocks of a method, what each preconditions, and where it stands in its schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.gradients import read_gradient, write_gradient
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.methods import METHODS
from lightning_plugins.engines.preconditioning.plan import Plan


@dataclass(eq=False)
class Slot:
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

    def has_gradients(self) -> bool:
        """Return whether this step has gradients for it.

        Raises:
            InputError: if the block couples layers and some of them have none.
        """
        with_gradient = [parameter.grad is not None for parameter in self.parameters]
        if self.entry.joint and any(with_gradient) and not all(with_gradient):
            layer = next(layer for layer in self.layers if any(parameter.grad is None for parameter in layer.parameters))
            raise InputError(
                f"{self.name} couples all layers, and {layer.name} has no gradient in this step; leave it out with "
                f"ignore=[{layer.name!r}], or choose a method that takes each layer by itself, such as layer"
            )
        return all(with_gradient)

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

    @property
    def shapes(self) -> list[list[int]]:
        """Of the parameters, as plain values."""
        return [list(parameter.shape) for parameter in self.parameters]

    def state_dict(self) -> State:
        """Return what to save of it."""
        return {
            "name": self.name,
            "shapes": self.shapes,
            "steps": self.steps,
            "folded": self.folded,
            "state": self.block.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from what ``state_dict`` returned."""
        self.steps, self.folded, self.seen = state["steps"], state["folded"], state["folded"]
        self.block.load_state_dict(state["state"], self.parameters[0].device)


def build_slots(plan: Plan, method: str, fisher: str, settings: Any) -> list[Slot]:
    """Make the blocks of a plan.

    Args:
        plan: what is preconditioned by what.
        method: name in ``METHODS`` of what the user chose; norm layers may have another.
        fisher: Fisher type of the blocks that have it; the others take their default.
        settings: of the chosen method.
    """
    entry = METHODS[method]
    if entry.gradient_only:
        return [Slot(name, entry, entry.make(parameter, settings), (), (parameter,)) for name, parameter, _ in plan.parameters]
    slots = []
    layers = {id(layer): (layer, chosen) for _, layer, chosen in plan.layers}.values()
    joint = tuple(layer for layer, chosen in layers if chosen == method) if entry.joint else ()
    if joint:
        every = tuple(parameter for layer in joint for parameter in layer.parameters)
        slots.append(Slot(method, entry, entry.make(joint, settings, fisher), joint, every))
    for layer, chosen in layers:
        if layer in joint:
            continue
        used = METHODS[chosen]
        own = settings if chosen == method else used.settings()
        fisher = fisher if fisher in used.fishers else used.fishers[0]
        slots.append(Slot(layer.name, used, used.make(layer, own, fisher), (layer,), layer.parameters))
    return slots


def check_same_model(slots: Sequence[Slot], saved: Sequence[State]) -> None:
    """Refuse a state of another model, and name the first layer that differs."""
    theirs = [(state["name"], state["shapes"]) for state in saved]
    ours = [(slot.name, slot.shapes) for slot in slots]
    for index in range(max(len(ours), len(theirs))):
        their, own = (side[index] if index < len(side) else ("nothing", "") for side in (theirs, ours))
        if their != own:
            raise InputError(
                f"the checkpoint is of another model: it has layer {their[0]} {their[1]} where this one has {own[0]} {own[1]}"
                "; load the checkpoint of this model, or start without its state"
            )
