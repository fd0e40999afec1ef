"""EK-FAC: K-FAC's eigenbases, with the true second moments of the gradients along them for eigenvalues.

    A = U_A . U_A^T    G = U_G . U_G^T    S = sum_n (U_G^T P_n U_A)^2 / terms    P = U_G [(U_G^T V U_A) / (S + lambda)] U_A^T

Paper: George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", 2018. ``S`` is the diagonal
of the Fisher matrix in that basis, so the approximation is never worse than K-FAC's in Frobenius norm. It is taken at every
observation, the bases only at every refresh; ``P_n`` is squared after its positions are summed, which shortcuts for convolutions
and sequences skip. We differ in what becomes of the average of ``S`` when the bases turn: it follows, as the diagonal in the new
basis of the matrix that it stood for. The input side of an embedding stays its tokens, whose factor is diagonal already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.examples import Examples, Rows, example_gradients, sum_of_squares
from lightning_plugins.engines.preconditioning.factors import RunningMean
from lightning_plugins.engines.preconditioning.kronecker import KroneckerFactors
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, symmetric_eigenvalues
from lightning_plugins.engines.preconditioning.settings import (
    POSITIONS,
    Positions,
    check_choice,
    check_count,
    check_decay,
)


@dataclass(frozen=True)
class EKFACSettings:
    """Options of EK-FAC.

    Args:
        positions: of the factors that give the bases: ``expand`` (every position is an example) or ``reduce`` (positions are
            averaged first).
        decay: of the running averages of the factors and of the second moments in their bases.
        max_dim: factors wider than this become block-diagonal.

    Raises:
        InputError: where a value is out of range.
    """

    positions: Positions = "expand"
    decay: float = 0.95
    max_dim: int = 1024

    def __post_init__(self) -> None:
        check_choice("positions", self.positions, POSITIONS)
        check_decay("decay", self.decay)
        check_count("max_dim", self.max_dim)


class EKFAC:
    """The state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.CorrectedBlock`.

    Attributes:
        factors: K-FAC's.
        examples: of this step, kept until the bases are refreshed.
        moments: running average of ``S``: ``(B, O, I)`` filled up to whole pieces of the factors.
    """

    def __init__(self, layer: Layer, settings: EKFACSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.trouble = Trouble()
        self.factors = KroneckerFactors(layer, settings.positions, settings.decay, settings.max_dim)
        self.examples = Examples(layer)
        self.moments = RunningMean(settings.decay)
        blocks, out_dim, in_dim = layer.shape
        self._vocabulary = in_dim if self.factors.diagonal_inputs else 0
        self._out_pieces, self._in_pieces = self.factors.output_pieces, self.factors.input_pieces
        self._shape = (
            blocks,
            -(-out_dim // self._out_pieces) * self._out_pieces,
            -(-in_dim // self._in_pieces) * self._in_pieces,
        )
        self.refresh_cost = 10.0 * blocks * (self._shape[1] ** 3 / self._out_pieces**2)
        self.refresh_cost += 0.0 if self._vocabulary else 10.0 * blocks * (self._shape[2] ** 3 / self._in_pieces**2)
        self._bases: list[Tensor] = []  # U_G (B, pieces, o, o), and U_A (B, pieces, i, i) but of an embedding
        self._damping = torch.ones((), dtype=self.factors.dtype, device=layer.weight.device)
        self._corrections: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.factors.rows

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        self.factors.accumulate_inputs(x)

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self.factors.accumulate_output_gradients(gradient, scale)
        self.examples.add(x, gradient, scale)

    def finish_pass(self) -> None:
        self.examples.finish_pass()

    def pending(self) -> list[Tensor]:
        return self.factors.pending()

    def fold(self, rows: int, terms: float) -> None:
        self.factors.fold(rows, terms)

    def clear(self) -> None:
        self.factors.clear()
        self.examples.clear()
        self._corrections = None

    def refresh(self, damping: float) -> None:
        """Take the factors' eigenbases, and turn ``S`` into them; a factor without an answer keeps both bases as they are."""
        self._damping.fill_(damping)
        old, values = self._present_bases(), [self.factors.outputs.value]
        values += [] if self._vocabulary else [self.factors.inputs.value]
        new = []
        for value in values:
            assert value is not None
            found = symmetric_eigenvalues(value, self.trouble)
            if found is None:
                return
            new.append(found[1].contiguous())
        self._bases = new
        if self.moments.value is not None:  # E (u^T F u) for u of the new basis: squared cosines between the bases
            turns = [(after.mT @ before).square() for after, before in zip(new, old, strict=True)]
            turned = _turned(self.moments.value.mT, turns[0].mT).mT
            self.moments.value = turned.contiguous() if self._vocabulary else _turned(turned, turns[1].mT)

    def derived(self) -> list[Tensor]:
        moments = [] if self.moments.value is None else [self.moments.value]
        return [self._damping, *self._present_bases(), *moments]

    def corrections(self) -> list[Tensor]:
        """Return ``sum_n (U_G^T P_n U_A)^2`` over this step's examples."""
        bases = self._present_bases()
        total = torch.zeros(self._shape, dtype=self.factors.dtype, device=self._damping.device)
        for rows in self.examples.rows():
            total.add_(_squares_along(bases, rows, self._vocabulary))
        self._corrections = total
        return [total]

    def fold_corrections(self, terms: float) -> None:
        assert self._corrections is not None
        self.moments.add(self._corrections.div_(terms))
        self._corrections = None

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``U_G [(U_G^T V U_A) / (S + lambda)] U_A^T``; before the first refresh the bases are the identity."""
        (gradient,) = gradients
        bases = self._present_bases()
        assert self.moments.value is not None
        _, out_dim, in_dim = gradient.shape
        turned = _turned(gradient.to(self.factors.dtype).mT, bases[0]).mT
        turned = turned if self._vocabulary else _turned(turned, bases[1])
        turned = turned / (self.moments.value + self._damping)
        turned = turned if self._vocabulary else _turned(turned, bases[1].mT)
        return [_turned(turned.mT, bases[0].mT).mT[:, :out_dim, :in_dim].to(gradient.dtype)]

    def state_dict(self) -> State:
        return {
            "factors": self.factors.state_dict(),
            "moments": self.moments.state_dict(),
            "bases": list(self._bases),
            "damping": self._damping,
        }

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self.factors.load_state_dict(state["factors"], device)
        self.moments.load_state_dict(state["moments"], device)
        self._bases = [basis.to(device, copy=True) for basis in state["bases"]]
        self._damping = state["damping"].to(device, copy=True)

    def _present_bases(self) -> list[Tensor]:
        """Return the bases, or make identities."""
        if not self._bases:
            blocks, out_dim, in_dim = self._shape
            sides = [(out_dim, self._out_pieces)] + ([] if self._vocabulary else [(in_dim, self._in_pieces)])
            for dim, pieces in sides:
                size = dim // pieces
                identity = torch.eye(size, dtype=self.factors.dtype, device=self._damping.device)
                self._bases.append(identity.expand(blocks, pieces, size, size).contiguous())
        return self._bases


def _squares_along(bases: Sequence[Tensor], rows: Rows, vocabulary: int) -> Tensor:
    """Return ``sum_n (U_G^T P_n U_A)^2``; rows or ``P_n`` are turned, whichever takes fewer operations."""
    if vocabulary:
        return sum_of_squares(rows._replace(gradients=_turned(rows.gradients, bases[0])), vocabulary)
    positions, in_dim, out_dim = rows.inputs.shape[2], rows.inputs.shape[3], rows.gradients.shape[3]
    if positions * (in_dim**2 + out_dim**2) <= in_dim * out_dim * (in_dim + out_dim):
        return sum_of_squares(Rows(rows.first, _turned(rows.inputs, bases[1]), _turned(rows.gradients, bases[0])))
    turned = _turned(example_gradients(rows), bases[1])
    return _turned(turned.mT, bases[0]).square_().sum(dim=1).mT


def _turned(x: Tensor, basis: Tensor) -> Tensor:
    """Multiply the last axis of ``(B, ..., F)`` by a block-diagonal matrix ``(B, pieces, f, f)``, filled up with zeros."""
    blocks, pieces, size, _ = basis.shape
    x = functional.pad(x, (0, pieces * size - x.shape[-1]))
    rows = x.reshape(blocks, -1, pieces, size).transpose(1, 2)
    return (rows @ basis).transpose(1, 2).reshape(x.shape)


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="layer, diagonal in the Kronecker factors' eigenbasis",
    solver="eigendecomposition, reciprocal",
    extra_passes="empirical 0; mc: a backward pass a sample; exact: a backward pass a class",
    memory="2 (I^2 + O^2) + O I, and inputs and output gradients of a step",
    fishers=("empirical", "mc", "exact"),
    settings=EKFACSettings,
    make=EKFAC,
    symmetric_sums=True,
    corrected=True,
    damping=0.03,
    per_example=True,
)
