"""SENG: the natural gradient of every layer, solved among the examples, whose inner products are sketched.

With ``p_n = sum_r d_nr a_nr^T`` the gradient of example ``n``, ``U`` the matrix of all ``p_n`` and ``K = U^T U``, Sherman,
Morrison and Woodbury give

    (U U^T / terms + lambda I)^-1 V   = (V - U u) / lambda        (K + terms lambda I) u = U^T V
    (U U^T / terms + lambda I)^-1 U c = U w                       (K / terms + lambda I) w = c

``K`` is costly, and is estimated: of the ``I`` inputs and ``O`` output gradients ``q`` each are drawn, scaled by ``sqrt(I / q)``
and ``sqrt(O / q)``, so that ``K_nm = sum_rs (a_nr . a_ms) (d_nr . d_ms)`` has the right mean; and a convolution's ``d_n``, ``R x
O``, is replaced by its best approximation of a small rank, which has so many positions. ``U^T V`` is taken of the same drawn
entries: beside a sketched ``K`` an exact one would leave the error of the sketch over the damping, and turn directions round.
``U w`` is an exact product of matrices, and no ``p_n`` is formed. Paper: Yang et al., "Sketchy Empirical Natural Gradient Methods
for Deep Learning", 2020. We use the second line for the part of ``V`` that is a multiple of the examples' own gradient (all of it
unless something was added): there both agree, and this one subtracts nothing.

The curvature is that of one step. ``K`` couples all examples, and sums over ranks cannot make it, so there must be a single
process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.examples import Examples, Rows
from lightning_plugins.engines.preconditioning.factors import CHUNK_BYTES
from lightning_plugins.engines.preconditioning.gram import damped_gram, products_with, weighted_sum
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.settings import check_count


@dataclass(frozen=True)
class SENGSettings:
    """Options of SENG.

    Args:
        sketch: inputs and output gradients that are drawn for the inner products; None takes all of them.
        rank: positions that a layer with more of them is reduced to for the inner products; None keeps all.
        seed: of the draws.

    Raises:
        InputError: where a value is out of range.
    """

    sketch: int | None = 256
    rank: int | None = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sketch", "rank"):
            if (value := getattr(self, name)) is not None:
                check_count(name, value)


class SENG:
    """SENG's state of one layer; see :class:`~lightning_plugins.engines.preconditioning.blocks.TappedBlock`."""

    def __init__(self, layer: Layer, settings: SENGSettings, fisher: str) -> None:
        self.layers = (layer,)
        self.settings = settings
        self.rows = 0
        self.trouble = Trouble()
        self.refresh_cost = 1.0
        device = layer.weight.device
        self._generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(settings.seed)
        self._examples = Examples(layer)
        self._count = 0
        self._scale = 1.0  # of the present pass
        self._coefficients: list[float] = []  # c_n: the gradient of the loss is sum_n c_n p_n
        self._terms = 0.0
        self._damping = 1.0
        self._features: tuple[Tensor | None, Tensor | None] = None, None  # that were drawn of inputs and outputs
        self._sketched: list[Rows] = []
        self._gram: Tensor | None = None
        self._factor: Tensor | None = None

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        """Count them; they are needed beside the output's gradients."""
        self.rows += x.numel()

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self._examples.add(x, gradient, scale)
        self._scale = scale

    def finish_pass(self) -> None:
        new = self._examples.finish_pass(self._count)
        self._coefficients += [self._scale] * new
        self._count += new

    def pending(self) -> list[Tensor]:
        """Return ``K``; it is looked at, never added over ranks."""
        if self._gram is None:
            self._gram = self._sketched_gram()
        return [self._gram]

    def fold(self, rows: int, terms: float) -> None:
        self._terms = terms

    def clear(self) -> None:
        self.rows, self._count, self._terms = 0, 0, 0.0
        self._coefficients, self._sketched, self._gram, self._factor = [], [], None, None
        self._examples.clear()

    def refresh(self, damping: float) -> None:
        """Factor ``K / terms + lambda I`` in float64, where ``K`` is small and its rounding is not."""
        if not self._terms:
            return
        self._factor, self._damping = damped_gram(self.pending()[0].double() / self._terms, damping, self.trouble)

    def derived(self) -> list[Tensor]:
        return [] if self._factor is None else [self._factor]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the natural gradient, or the gradient itself where this step saw nothing finite."""
        (given,) = gradients
        if self._factor is None:
            return [given]
        gradient = given.to(self._examples.dtype)
        coefficients = torch.tensor(self._coefficients, dtype=torch.float64, device=given.device)
        own = self._combined(coefficients)
        share = (own * gradient).sum().double() / own.square().sum().double().clamp_min(torch.finfo(torch.float64).tiny)
        rest = gradient - share.to(gradient.dtype) * own
        products = torch.zeros_like(coefficients)
        inputs, outputs = self._features
        sketched = _sampled(_sampled(rest, inputs).mT, outputs).mT
        for rows in self._sketched:
            products[rows.indices] += products_with(rows, sketched).double()
        right = share * coefficients - products / (self._damping * self._terms)
        weights = torch.cholesky_solve(right.unsqueeze(1), self._factor).squeeze(1)
        return [(self._combined(weights) + rest / self._damping).to(given.dtype)]

    def state_dict(self) -> State:
        """Return where the draws stand; the curvature itself does not outlive a step."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        self._generator.set_state(state["generator"].cpu())

    def _combined(self, weights: Tensor) -> Tensor:
        """Return ``sum_n weights_n p_n`` as ``w_BOI``."""
        blocks, out_dim, in_dim = self.layers[0].shape
        total = torch.zeros(blocks, out_dim, in_dim, dtype=self._examples.dtype, device=weights.device)
        for rows in self._examples.rows():
            total += weighted_sum(rows, weights[rows.indices], in_dim)
        return total

    def _sketched_gram(self) -> Tensor:
        _, out_dim, in_dim = self.layers[0].shape
        self._features = inputs, outputs = self._drawn(in_dim), self._drawn(out_dim)
        self._sketched = []
        for rows in self._examples.rows():
            a, d = _low_rank(rows.inputs, rows.gradients, self.settings.rank)
            self._sketched += _few(Rows(rows.first, _sampled(a, inputs), _sampled(d, outputs)))
        gram = torch.zeros(self._count, self._count, dtype=self._examples.dtype, device=self.layers[0].weight.device)
        for rows in self._sketched:
            for others in self._sketched:
                products = _products(rows.inputs, others.inputs) * _products(rows.gradients, others.gradients)
                gram[rows.indices, others.indices] += products.sum((0, 2, 4))
        return gram

    def _drawn(self, features: int) -> Tensor | None:
        """Return the indices of a sketch, without repetition; None takes all."""
        size = self.settings.sketch
        if size is None or size >= features or not self._count:
            return None
        return torch.randperm(features, generator=self._generator, device=self._generator.device)[:size]


def _sampled(rows: Tensor, features: Tensor | None) -> Tensor:
    """Return some of the features of rows ``(..., F)``, scaled so that inner products keep their mean."""
    return rows if features is None else rows[..., features] * math.sqrt(rows.shape[-1] / len(features))


def _low_rank(inputs: Tensor, gradients: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return rows with at most ``rank`` positions whose ``p_n`` are those of the best approximation of the gradients."""
    if rank is None or inputs.shape[2] <= rank:
        return inputs, gradients
    left, values, right = torch.linalg.svd(gradients, full_matrices=False)
    return left[..., :rank].mT @ inputs, values[..., :rank, None] * right[..., :rank, :]


def _few(rows: Rows) -> list[Rows]:
    """Cut rows into parts so small that the products of two of them stay within the chunk size."""
    blocks, count, positions, _ = rows.inputs.shape
    size = max(1, int(math.sqrt(CHUNK_BYTES / rows.inputs.element_size() / blocks)) // positions)
    return [
        Rows(rows.first + start, rows.inputs[:, start : start + size], rows.gradients[:, start : start + size])
        for start in range(0, count, size)
    ]


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """Return all inner products of rows ``(B, N, R, F)`` with others as ``(B, N, R, M, S)``."""
    products = rows.flatten(1, 2) @ others.flatten(1, 2).mT
    return products.view(*rows.shape[:3], *others.shape[1:3])


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="layer",
    solver="Woodbury: Cholesky among the examples, sketched inner products",
    extra_passes="0",
    memory="N^2, and inputs and output gradients of a step",
    fishers=("empirical",),
    settings=SENGSettings,
    make=SENG,
    kinds=("linear", "convolution", "transposed convolution"),
    per_example=True,
    couples_examples=True,
    damping=0.3,
)
