"""Natural gradient with the full Fisher matrix of all layers together, solved among the examples instead of the weights.

With ``p_n`` the gradient of example ``n`` over all layers, flattened, ``F = sum_n p_n p_n^T / terms``; Sherman, Morrison and
Woodbury turn the solve over weights into one over examples:

    K_nm = <p_n, p_m>    P = (F + lambda I)^-1 V = (V - sum_n u_n p_n / terms) / lambda    (K / terms + lambda I) u = <p_n, V>

The gradient of the loss lies in the span of the examples' own: ``V = alpha sum_n c_n p_n`` with ``c_n`` known. Of the empirical
Fisher matrix, then, ``P = alpha sum_n w_n p_n`` with ``(K / terms + lambda I) w = c``: nothing is subtracted, and a small damping
costs no digits. That form is used as long as ``V`` is what the examples say, and the general one where something was added to
it (a penalty on the weights). Paper: Ren and Goldfarb, "Efficient Subsampled Gauss-Newton and Natural Gradient Methods for
Training Neural Networks", 2019.

It is the Fisher matrix of one step, without an average over steps. ``mc`` and ``exact`` count every sample and every class as an
example of its own. ``K`` couples all examples, and sums over ranks cannot make it, so there must be a single process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.blocks import MethodEntry, State
from lightning_plugins.engines.preconditioning.examples import Examples
from lightning_plugins.engines.preconditioning.gram import add_gram, damped_gram, products_with, weighted_sum
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble


@dataclass(frozen=True)
class NaturalGradientSettings:
    """The natural gradient has no options of its own."""


class NaturalGradient:
    """The state of layers that share one Fisher matrix; see
    :class:`~lightning_plugins.engines.preconditioning.blocks.TappedBlock`.

    Nothing outlives a step: there is no state to save.
    """

    def __init__(self, layers: Sequence[Layer], settings: NaturalGradientSettings, fisher: str) -> None:
        self.layers = tuple(layers)
        self.rows = 0
        self.trouble = Trouble()
        self.refresh_cost = 1.0
        self._examples = {id(layer): Examples(layer) for layer in self.layers}
        self._dtype = max((examples.dtype for examples in self._examples.values()), key=lambda dtype: dtype.itemsize)
        self._spans_gradient = fisher == "empirical"
        self._count = 0
        self._scale = 1.0  # of the present pass
        self._coefficients: list[float] = []  # c_n
        self._terms = 0.0
        self._damping = 1.0
        self._gram: Tensor | None = None
        self._factor: Tensor | None = None

    def accumulate_inputs(self, layer: Layer, x: Tensor) -> None:
        """Count them; they are needed beside the output's gradients."""
        self.rows += x.numel()

    def accumulate_output_gradients(self, layer: Layer, x: Tensor, gradient: Tensor, scale: float) -> None:
        self._examples[id(layer)].add(x, gradient, scale)
        self._scale = scale

    def finish_pass(self) -> None:
        """Number this pass's examples, the same in all layers.

        Raises:
            InputError: if layers saw different numbers of examples.
        """
        counts = {layer.name: self._examples[id(layer)].finish_pass(self._count) for layer in self.layers}
        counts = {name: count for name, count in counts.items() if count}
        if len(set(counts.values())) > 1:
            fewest, most = (choose(counts, key=lambda name: counts[name]) for choose in (min, max))
            raise InputError(
                f"in one backward pass layer {fewest} saw {counts[fewest]} examples and layer {most} {counts[most]}; the full "
                "Fisher matrix needs the batch on the first axis in every layer: keep it there, leave a layer out with ignore=, "
                "or use method 'layer'"
            )
        new = max(counts.values(), default=0)
        self._coefficients += [self._scale] * new
        self._count += new

    def pending(self) -> list[Tensor]:
        """Return ``K``; it is looked at, never added over ranks."""
        if self._gram is None:
            device = self.layers[0].weight.device
            self._gram = torch.zeros(self._count, self._count, dtype=self._dtype, device=device)
            for examples in self._examples.values():
                add_gram(self._gram, examples)
        return [self._gram]

    def fold(self, rows: int, terms: float) -> None:
        self._terms = terms

    def clear(self) -> None:
        self.rows, self._count, self._terms = 0, 0, 0.0
        self._coefficients, self._gram, self._factor = [], None, None
        for examples in self._examples.values():
            examples.clear()

    def refresh(self, damping: float) -> None:
        """Factor ``K / terms + lambda I`` in float64, where ``K`` is small and its rounding is not."""
        if not self._terms:
            return
        self._factor, self._damping = damped_gram(self.pending()[0].double() / self._terms, damping, self.trouble)

    def derived(self) -> list[Tensor]:
        return [] if self._factor is None else [self._factor]

    def directions(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the natural gradient of all layers, or the gradients themselves where this step saw nothing finite."""
        if self._factor is None:
            return list(gradients)
        given = [gradient.to(self._dtype) for gradient in gradients]
        products = torch.zeros(self._count, dtype=self._dtype, device=self._factor.device)
        for examples, gradient in zip(self._examples.values(), given, strict=True):
            for rows in examples.rows():
                products[rows.indices] += products_with(rows, gradient)
        weights, share = self._weights(products.double(), sum(gradient.double().square().sum() for gradient in given))
        weights = weights.to(self._dtype)
        directions = []
        for examples, gradient in zip(self._examples.values(), given, strict=True):
            total = gradient * share.to(self._dtype)
            for rows in examples.rows():
                total += weighted_sum(rows, weights[rows.indices], total.shape[-1])
            directions.append(total)
        return [direction.to(gradient.dtype) for direction, gradient in zip(directions, gradients, strict=True)]

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        """Nothing: every step makes what it needs."""

    def _weights(self, products: Tensor, square: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return what the examples' gradients count in the direction, ``(N,)``, and what ``V`` itself counts.

        Args:
            products: ``<p_n, V>``.
            square: ``|V|^2``.
        """
        assert self._factor is not None
        assert self._gram is not None
        solve = torch.cholesky_solve
        general = -solve(products.unsqueeze(1), self._factor).squeeze(1) / (self._damping * self._terms)
        share = general.new_full((), 1.0 / self._damping)
        if not self._spans_gradient:
            return general, share
        coefficients = torch.tensor(self._coefficients, dtype=torch.float64, device=products.device)
        own = coefficients @ (self._gram.double() @ coefficients)
        alpha = (coefficients @ products) / own.clamp_min(torch.finfo(torch.float64).tiny)
        # |V - alpha sum c p|^2 cannot be told from 0 below the rounding of |V|^2 itself.
        left = square - alpha * (coefficients @ products)
        spanned = left <= 64 * torch.finfo(self._dtype).eps * square
        spanning = alpha * solve(coefficients.unsqueeze(1), self._factor).squeeze(1)
        return torch.where(spanned, spanning, general), torch.where(spanned, torch.zeros_like(share), share)


ENTRY = MethodEntry(
    curvature="Fisher",
    granularity="all layers jointly",
    solver="Woodbury: Cholesky among the examples",
    extra_passes="empirical 0; mc: a backward pass a sample; exact: a backward pass a class",
    memory="N^2 in all, and inputs and output gradients of a step",
    fishers=("empirical", "mc", "exact"),
    settings=NaturalGradientSettings,
    make=NaturalGradient,
    kinds=("linear", "convolution", "transposed convolution", "embedding", "norm"),
    joint=True,
    per_example=True,
    couples_examples=True,
    damping=0.01,
)
