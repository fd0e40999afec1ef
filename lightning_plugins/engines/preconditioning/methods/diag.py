"""Diagonal natural gradient: the diagonal of the Fisher matrix.

    S = sum_n P_n^2 / terms        P = V / (S + lambda)        entry by entry

Papers: Becker and LeCun, "Improving the convergence of back-propagation learning with second-order methods", 1988; Martens,
"New insights and perspectives on the natural gradient method", 2020, section 11. ``P_n`` is squared after its positions are
summed; of a layer with one position ``S = (d^2)^T (a^2)``. It differs from Adam in that examples are squared, not their mean, and
that no root is taken. An embedding's ``S`` is made from the tokens that occur.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.examples import Examples, sum_of_squares
from lightning_plugins.engines.preconditioning.factors import RunningMean
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.settings import check_decay


@dataclass(frozen=True)
class DiagSettings:
    """Options of the diagonal natural gradient.

    Args:
        decay: of the running average of the diagonal.

    Raises:
        InputError: where it is out of range.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        check_decay("decay", self.decay)


class Diag:
    """The state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.TappedBlock`."""

    def __init__(self, layer: Layer, settings: DiagSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.rows = 0
        self.trouble = Trouble()
        self.refresh_cost = float(layer.weight.numel())
        self.examples = Examples(layer)
        self.fisher = RunningMean(settings.decay)
        self._sum: Tensor | None = None
        self._inverse: Tensor | None = None

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        """Count them; they are needed beside the output's gradients."""
        self.rows += x.numel()

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self.examples.add(x, gradient, scale)

    def finish_pass(self) -> None:
        """Add the squares of this pass's ``P_n``."""
        self.examples.finish_pass()
        (total,) = self.pending()
        for rows in self.examples.rows():
            total.add_(sum_of_squares(rows, self.layers[0].shape[2]))
        self.examples.clear()

    def pending(self) -> list[Tensor]:
        if self._sum is None:
            self._sum = torch.zeros(self.layers[0].shape, dtype=self.examples.dtype, device=self.layers[0].weight.device)
        return [self._sum]

    def fold(self, rows: int, terms: float) -> None:
        (total,) = self.pending()
        self.fisher.add(total.div_(terms))
        self.clear()

    def clear(self) -> None:
        self.rows, self._sum = 0, None
        self.examples.clear()

    def refresh(self, damping: float) -> None:
        assert self.fisher.value is not None
        self._inverse = (self.fisher.value + damping).reciprocal_()

    def derived(self) -> list[Tensor]:
        if self._inverse is None:
            self._inverse = torch.ones(self.layers[0].shape, dtype=self.examples.dtype, device=self.layers[0].weight.device)
        return [self._inverse]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``V / (S + lambda)``, or the gradient itself as long as there was no refresh."""
        (gradient,) = gradients
        (inverse,) = self.derived()
        return [(gradient.to(inverse.dtype) * inverse).to(gradient.dtype)]

    def state_dict(self) -> State:
        return {"fisher": self.fisher.state_dict(), "inverse": [] if self._inverse is None else [self._inverse]}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.fisher.load_state_dict(state["fisher"], device)
        self._inverse = state["inverse"][0].to(device, copy=True) if state["inverse"] else None


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="element",
    solver="reciprocal",
    extra_passes="empirical 0; mc: a backward pass a sample; exact: a backward pass a class",
    memory="2 O I",
    fishers=("empirical", "mc", "exact"),
    settings=DiagSettings,
    make=Diag,
    kinds=("linear", "convolution", "transposed convolution", "embedding", "norm"),
    per_example=True,
)
