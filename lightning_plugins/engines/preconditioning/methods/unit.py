"""Unit-wise natural gradient: the exact Fisher matrix of every output unit, and nothing between units.

    F_o = sum_n p_n p_n^T / terms      p_n = row o of P_n        P_o = (F_o + lambda I)^-1 V_o

Papers: Le Roux et al., "Topmoumoute online natural gradient", 2007; Ollivier, "Riemannian metrics for neural networks", 2015;
Osawa et al., 2020 (norm layers). Of a norm layer a unit is a feature, and ``F_o`` the 2x2 matrix of its scale and shift. The
normalized input is computed anew with the layer's statistics, never as ``(y - shift) / scale``, so a scale of 0 is no trouble.
In other layers ``F_o`` is ``I x I`` for each of ``O`` units: for small layers; wider ones fall into blocks of ``max_dim`` inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.examples import Examples, example_gradients
from lightning_plugins.engines.preconditioning.factors import RunningMean
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, damped_inverse
from lightning_plugins.engines.preconditioning.settings import check_count, check_decay


@dataclass(frozen=True)
class UnitSettings:
    """Options of the unit-wise natural gradient.

    Args:
        decay: of the running average of the Fisher blocks.
        max_dim: units with more inputs (the bias not counted) have a block-diagonal Fisher matrix.

    Raises:
        InputError: where a value is out of range.
    """

    decay: float = 0.95
    max_dim: int = 128

    def __post_init__(self) -> None:
        check_decay("decay", self.decay)
        check_count("max_dim", self.max_dim)


class Unit:
    """The state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.TappedBlock`."""

    def __init__(self, layer: Layer, settings: UnitSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.rows = 0
        self.trouble = Trouble()
        self.examples = Examples(layer)
        self.fisher = RunningMean(settings.decay)
        blocks, out_dim, in_dim = layer.shape
        self._pieces = max(1, math.ceil((in_dim - (layer.bias is not None)) / settings.max_dim))
        self._width = math.ceil(in_dim / self._pieces)
        self._shape = (blocks, out_dim, self._pieces, self._width, self._width)
        self.refresh_cost = float(blocks * out_dim * self._pieces * self._width**3)
        self._sum: Tensor | None = None
        self._inverse: Tensor | None = None

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        """Count them; they are needed beside the output's gradients."""
        self.rows += len(x)

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self.examples.add(x, gradient, scale)

    def finish_pass(self) -> None:
        """Add the outer products of this pass's ``p_n``."""
        self.examples.finish_pass()
        (total,) = self.pending()
        for rows in self.examples.rows():
            units = self._split(example_gradients(rows).transpose(1, 2)).transpose(2, 3)  # (B, O, pieces, N, i)
            total.add_(units.mT @ units)
        self.examples.clear()

    def pending(self) -> list[Tensor]:
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=self.examples.dtype, device=self.layers[0].weight.device)
        return [self._sum]

    def fold(self, rows: int, terms: float) -> None:
        (total,) = self.pending()
        self.fisher.add(total.div_(terms))
        self.clear()

    def clear(self) -> None:
        self.rows, self._sum = 0, None
        self.examples.clear()

    def refresh(self, damping: float) -> None:
        """Invert the blocks; if one of them cannot be inverted, all keep their last inverses."""
        assert self.fisher.value is not None
        ridge = self.fisher.value.new_full((1,), damping)
        new = damped_inverse(self.fisher.value, ridge, self.trouble)
        self._inverse = self._inverse if new is None else new.contiguous()

    def derived(self) -> list[Tensor]:
        if self._inverse is None:
            identity = torch.eye(self._width, dtype=self.examples.dtype, device=self.layers[0].weight.device)
            self._inverse = identity.expand(self._shape).contiguous()
        return [self._inverse]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``F_o^-1 V_o`` for every unit, or the gradient itself as long as no inverse could be made."""
        (gradient,) = gradients
        (inverse,) = self.derived()
        units = self._split(gradient.to(inverse.dtype)).unsqueeze(-1)
        return [(inverse @ units).flatten(2)[..., : gradient.shape[-1]].to(gradient.dtype)]

    def state_dict(self) -> State:
        inverse = [] if self._inverse is None else [self._inverse]
        return {"fisher": self.fisher.state_dict(), "inverse": inverse}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.fisher.load_state_dict(state["fisher"], device)
        self._inverse = state["inverse"][0].to(device, copy=True) if state["inverse"] else None

    def _split(self, x: Tensor) -> Tensor:
        """Return ``(..., I)`` as ``(..., pieces, i)``, filled up with zeros."""
        return functional.pad(x, (0, self._pieces * self._width - x.shape[-1])).unflatten(-1, (self._pieces, self._width))


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="output unit",
    solver="Cholesky, a block a unit",
    extra_passes="empirical 0; mc: a backward pass a sample; exact: a backward pass a class",
    memory="2 O I min(I, max_dim)",
    fishers=("empirical", "mc", "exact"),
    settings=UnitSettings,
    make=Unit,
    kinds=("linear", "convolution", "transposed convolution", "norm"),
    symmetric_sums=True,
    per_example=True,
    damping=0.01,
)
