"""What a method is: blocks with separable tasks, and a line in the table.

The tasks of a block, in the order of a step: *accumulate* (inputs and output gradients, within the backward pass or later),
*reduce* (``pending`` is summed over ranks), *fold* (into running averages), *refresh* (the inverses, which need not happen each
step), *direction* (the preconditioned gradient). A scheduler may run each on its own; ``GradientPreconditioner`` runs all in
turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble

State = dict[str, Any]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for parameters of half precision, else their own: factors of bfloat16 cannot be inverted."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TappedBlock(Protocol):
    """The state of a method that watches what goes through layers; most have one layer, those that couple layers have several.

    Attributes:
        layers: what it preconditions.
        rows: input rows ``N R`` accumulated since the last ``clear``, on this process; 0 says that no layer was used.
        trouble: what its factorisations went through.
        refresh_cost: floating-point operations of ``refresh``, to share blocks out over ranks.
    """

    layers: Sequence[Layer]
    rows: int
    trouble: Trouble
    refresh_cost: float

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        """Add a module's input to the sums of this step."""

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        """Add the gradient of a module's output; divided by ``scale`` it is that of the sum of the terms' losses.

        Methods that need pairs find the input of the same call in ``x``.
        """

    def finish_pass(self) -> None:
        """Complete a backward pass: what several calls of one module brought belongs to the same examples."""

    def pending(self) -> list[Tensor]:
        """Return the sums of this step, to be added over ranks in place."""

    def fold(self, rows: int, terms: float) -> None:
        """Take the sums, over ``rows`` input rows and ``terms`` terms of the loss on all ranks, into the running averages."""

    def clear(self) -> None:
        """Drop the sums of this step."""

    def refresh(self, damping: float) -> None:
        """Make what ``directions`` needs from the running averages; a failure keeps what there was, or makes identities."""

    def derived(self) -> list[Tensor]:
        """Return what ``refresh`` made, or, where it never ran, tensors of the same shapes that receive another rank's."""

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return a preconditioned gradient ``w_BOI`` for that of every layer."""

    def state_dict(self) -> State:
        """Return tensors and plain values, live: running averages and what ``refresh`` made."""

    def load_state_dict(self, state: State, device: torch.device) -> None:
        """Take in what ``state_dict`` returned."""


class CorrectedBlock(TappedBlock, Protocol):
    """A tapped block with sums that only the refreshed bases allow (EK-FAC): reduced and folded after ``refresh``."""

    def corrections(self) -> list[Tensor]:
        """Return sums of this step in the present bases, to be added over ranks in place."""

    def fold_corrections(self, terms: float) -> None:
        """Take the reduced corrections into their running averages."""


class ReplayedBlock(TappedBlock, Protocol):
    """A tapped block that compares the batch of a step with itself after the step (K-BFGS)."""

    def accumulate_replayed(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        """Add an input and an output gradient of the second pass; as in ``accumulate_output_gradients``."""

    def replayed(self) -> list[Tensor]:
        """Return the sums of the second pass, to be added over ranks in place."""

    def fold_replayed(self, terms: float, damping: float) -> None:
        """Take the reduced sums in; 0 terms drop them."""


class GradientBlock(Protocol):
    """The state of a method that looks at one parameter's gradient alone."""

    trouble: Trouble
    refresh_cost: float

    def fold(self, gradient: Tensor) -> None:
        """Take the gradient of this step, of the parameter's own shape, into the running averages; every ``factor_every``
        steps."""

    def refresh(self) -> None:
        """Make roots or bases from the running averages; every ``inverse_every`` steps."""

    def direction(self, gradient: Tensor) -> Tensor:
        """Return what replaces the gradient, a new tensor of its shape; every step."""

    def state_dict(self) -> State:
        """Return tensors and plain values, live."""

    def load_state_dict(self, state: State, device: torch.device) -> None:
        """Take in what ``state_dict`` returned."""


@dataclass(frozen=True)
class MethodEntry:
    """A line in the table of methods.

    Attributes:
        curvature: which matrix it approximates.
        granularity: which entries of it are kept.
        solver: how it is inverted.
        extra_passes: beyond the training's own forward and backward, by Fisher type where that matters.
        memory: per weight matrix of O outputs and I inputs.
        fishers: valid Fisher types, the default first; empty where the method looks at gradients alone.
        settings: dataclass of the method's own options, with its defaults and checks.
        make: builds the block of a layer (tapped) or of a parameter (gradients), from it and the settings.
        kinds: layers that it preconditions; the others keep the plain gradient, or go to ``norm_method``.
        joint: whether one block takes all layers, as a list.
        gradient_only: whether ``make`` takes a parameter.
        refuses: says why a parameter keeps the plain gradient, or nothing; of methods that look at gradients alone.
        symmetric_sums: whether ``pending`` holds symmetric matrices and vectors alone, so that half of them need be sent.
        corrected: whether the blocks are :class:`CorrectedBlock`.
        replays: whether the blocks are :class:`ReplayedBlock`.
        per_example: whether a block squares or pairs gradients of whole examples, so that the columns of ``exact`` must come one
            position at a time.
        couples_examples: whether a block needs all examples of a step at once: in a single process, and at every step.
        damping: the default.
    """

    curvature: str
    granularity: str
    solver: str
    extra_passes: str
    memory: str
    fishers: tuple[str, ...]
    settings: type
    make: Callable[..., Any]
    kinds: tuple[str, ...] = ("linear", "convolution", "transposed convolution", "embedding")
    joint: bool = False
    gradient_only: bool = False
    refuses: Callable[[nn.Parameter], str] = lambda parameter: ""
    symmetric_sums: bool = False
    corrected: bool = False
    replays: bool = False
    per_example: bool = False
    couples_examples: bool = False
    damping: float = 1e-3
