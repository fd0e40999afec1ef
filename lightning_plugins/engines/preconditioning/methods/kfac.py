"""K-FAC: a Fisher matrix of Kronecker products, one per layer, inverted factor by factor.

    P = (G + sqrt(lambda)/pi I)^-1  V  (A + pi sqrt(lambda) I)^-1        pi = sqrt(mean diag A / mean diag G)

Papers: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; Grosse and Martens,
2016 (convolutions); Eschenhagen et al., 2023 (expand and reduce). We put the bias into ``A`` as an input that is always 1, and
correct the averages' bias, so that the first step sees its own factors and no identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.kronecker import KroneckerFactors
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, damped_cholesky, damped_inverse, divided
from lightning_plugins.engines.preconditioning.settings import (
    POSITIONS,
    Positions,
    check_choice,
    check_count,
    check_decay,
)

# A factor that is all zeros (a dead layer) must not make the other's share of the damping infinite.
_FLOOR = 1e-12


@dataclass(frozen=True)
class KFACSettings:
    """Options of K-FAC.

    Args:
        positions: ``expand`` (every position is an example) or ``reduce`` (positions are averaged first).
        decay: of the running averages of the factors.
        max_dim: factors wider than this become block-diagonal: the cost of a refresh grows with the cube of the width, and their
            memory with its square.
        relative_damping: damping is multiplied by the mean diagonal of the layer's curvature, so that it does not depend on the
            scale of the loss.

    Raises:
        InputError: where a value is out of range.
    """

    positions: Positions = "expand"
    decay: float = 0.95
    max_dim: int = 512
    relative_damping: bool = False

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, POSITIONS)
        check_decay("decay", self.decay)
        check_count("max_dim", self.max_dim)


class KFAC:
    """K-FAC's state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.TappedBlock`."""

    def __init__(self, layer: Layer, settings: KFACSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.settings = settings
        self.trouble = Trouble()
        self.factors = KroneckerFactors(
            layer, settings.positions, settings.decay, settings.max_dim, with_outputs=fisher != "forward"
        )
        blocks, out_dim, in_dim = layer.shape
        widths = [out_dim / self.factors.output_pieces] * self.factors.output_pieces
        widths += [] if self.factors.diagonal_inputs else [in_dim / self.factors.input_pieces] * self.factors.input_pieces
        self.refresh_cost = blocks * sum(width**3 for width in widths)
        # The input side keeps a Cholesky factor at first: two triangular solves cost little more than a product with the inverse,
        # and making that takes two thirds of I^3 more. From the second use on the inverse pays.
        self._solvers: list[Tensor] = []
        self._uses = 0

    @property
    def rows(self) -> int:
        return self.factors.rows

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        self.factors.accumulate_inputs(x)

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self.factors.accumulate_output_gradients(gradient, scale)

    def finish_pass(self) -> None:
        """Nothing waits for the end of a pass: every row counts by itself."""

    def pending(self) -> list[Tensor]:
        return self.factors.pending()

    def fold(self, rows: int, terms: float) -> None:
        self.factors.fold(rows, terms)

    def clear(self) -> None:
        self.factors.clear()

    def refresh(self, damping: float) -> None:
        """Factorise ``A`` and ``G`` with the damping split between them; if one cannot be, both keep what they had."""
        inputs, outputs = self.factors.inputs.value, self.factors.outputs.value
        assert inputs is not None
        input_ridge, output_ridge = self._ridges(damping)
        new: list[Tensor | None] = []
        if self.factors.diagonal_inputs:
            new.append((inputs + input_ridge).reciprocal())
        else:
            new.append(damped_cholesky(inputs, input_ridge[:, None, None], self.trouble))
        if outputs is not None:
            new.append(damped_inverse(outputs, output_ridge[:, None, None], self.trouble))
        if None not in new:
            self._solvers = [solver for solver in new if solver is not None]
            self._uses = 0
        elif not self._solvers:
            self._solvers = [
                torch.ones_like(factor) if factor.ndim == 1 else _identities(factor) for factor in self._factor_values()
            ]

    def derived(self) -> list[Tensor]:
        """Return inverses, and no Cholesky factor: who receives them could not tell the two apart."""
        if not self._solvers:
            self._solvers = [torch.empty_like(factor) for factor in self._factor_values()]
        elif self._uses < 2 and not self.factors.diagonal_inputs:
            self._solvers[0] = torch.cholesky_inverse(self._solvers[0])
        self._uses = 2
        return self._solvers

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``G^-1 V A^-1``, or the gradient itself as long as nothing could be factorised."""
        (gradient,) = gradients
        if not self._solvers:
            return [gradient]
        rows = self._divided_by_inputs(self.factors.blocked(gradient))
        self._uses += 1
        if len(self._solvers) == 2:
            rows = self._solvers[1].unsqueeze(2) @ rows
        return [self.factors.unblocked(rows).to(gradient.dtype)]

    def _divided_by_inputs(self, rows: Tensor) -> Tensor:
        if self.factors.diagonal_inputs:
            return rows * self._solvers[0]
        if self._uses == 0:
            return divided(rows, self._solvers[0].unsqueeze(1))
        if self._uses == 1:
            self._solvers[0] = torch.cholesky_inverse(self._solvers[0])
        return rows @ self._solvers[0].unsqueeze(1)

    def state_dict(self) -> State:
        return {"factors": self.factors.state_dict(), "solvers": list(self._solvers), "uses": self._uses}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.factors.load_state_dict(state["factors"], device)
        self._solvers = [solver.to(device, copy=True) for solver in state["solvers"]]
        self._uses = state["uses"]

    def _factor_values(self) -> list[Tensor]:
        values = (self.factors.inputs.value, self.factors.outputs.value)
        return [value for value in values if value is not None]

    def _ridges(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return what is added to the diagonals of ``A`` and ``G``, each ``(B,)``: their product is the damping."""
        input_trace, output_trace = (trace.clamp_min(_FLOOR) for trace in self.factors.mean_traces())
        absolute = (
            damping * input_trace * output_trace if self.settings.relative_damping else torch.full_like(input_trace, damping)
        )
        if not self.factors.with_outputs:
            return absolute, torch.zeros_like(absolute)
        split = (input_trace / output_trace).sqrt()
        return absolute.sqrt() * split, absolute.sqrt() / split


def _identities(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like).contiguous()


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="layer, Kronecker-factored",
    solver="Cholesky, damping split between the factors",
    extra_passes="empirical 0; mc: a backward pass a sample; exact: a backward pass a class",
    memory="2 (I^2 + O^2)",
    fishers=("empirical", "mc", "exact", "forward"),
    settings=KFACSettings,
    make=KFAC,
    symmetric_sums=True,
    damping=0.03,
)
