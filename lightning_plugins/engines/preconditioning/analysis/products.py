"""Products of curvature matrices with vectors, which never form the matrix.

With examples n = 1..N, outputs ``f_n``, their Jacobians ``J_n`` and losses ``l_n``, all means over the examples:

    hessian             1/N  sum_n  d^2 l_n / d theta^2                          may have negative eigenvalues
    gauss_newton        1/N  sum_n  J_n^T (d^2 l_n / d f_n^2) J_n                positive where the loss is convex in the output
    fisher              1/N  sum_n  J_n^T E_y[(d log p/d f_n) (d log p/d f_n)^T] J_n          targets drawn from the model
    empirical_fisher    1/N  sum_n  (d l_n / d theta) (d l_n / d theta)^T        the training's own targets

A loss that is a negative log-likelihood in its natural parameters (cross-entropy, binary cross-entropy with logits, squared
error) has a Hessian at the output that does not depend on the target and is that expectation: its exact Fisher matrix is its
Gauss-Newton matrix (Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020, section 9), and both
names compute the same here. Of another loss only the Gauss-Newton matrix is known without its distribution.

Papers: Pearlmutter, "Fast Exact Multiplication by the Hessian", 1994; Schraudolph, 2002. Hessians are symmetric, so products with
them are taken by two backward passes; forward-mode derivatives of some losses (squared error among them) fail in torch. A product
is one pass over the data, of about two forward and backward passes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis.flat_module import FlatModule, Parameters, pullback
from lightning_plugins.engines.preconditioning.analysis.operators import check_vector, dense_matrix
from lightning_plugins.engines.preconditioning.settings import check_choice

Curvature = Literal["hessian", "gauss_newton", "fisher", "empirical_fisher"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


class CurvatureOperator:
    """A curvature matrix over the flattened trainable parameters, mean over all examples of all batches.

    It sees the module as it is at each product: its present parameters, in its present mode. Nothing of the module changes.

    Args:
        module: maps a batch's inputs to one tensor, examples first.
        loss_function: ``loss_function(output, target)`` is a batch's loss, the *mean* over its examples, twice differentiable. A
            loss of an example is its part in that mean, times the examples of the batch.
        batches: ``(inputs, targets)``, a list or a DataLoader; it is gone through once a product, so it must hold the same
            examples each time (no random augmentation, no dropped rest).
        curvature: ``hessian``, ``gauss_newton``, ``fisher`` or ``empirical_fisher``.

    Attributes:
        size: trainable scalars, in the order of ``named_parameters``.
        dtype: of the parameters.
        device: of the parameters; batches are moved there.

    Raises:
        InputError: for an unknown curvature, batches that can be gone through only once, a module that draws random numbers, or,
            with ``empirical_fisher``, that uses a batch's own statistics.

    Example:
        >>> module = nn.Linear(1, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1))]
        >>> CurvatureOperator(module, nn.functional.mse_loss, batches).dense()
        tensor([[10.]])
    """

    def __init__(
        self, module: nn.Module, loss_function: LossFunction, batches: Batches, curvature: Curvature = "gauss_newton"
    ) -> None:
        check_choice("curvature", curvature, tuple(_PRODUCTS))
        if isinstance(batches, Iterator):
            raise InputError(f"batches must be gone through at every product, got a {type(batches).__name__}; give a list of it")
        self.flat = FlatModule(module)
        self.loss_function = loss_function
        self.batches = batches
        self.curvature = curvature
        self.size, self.dtype, self.device = self.flat.size, self.flat.dtype, self.flat.device
        self._checked = False

    def __repr__(self) -> str:
        return f"CurvatureOperator({type(self.flat.module).__name__}, {self.curvature!r}, size={self.size})"

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector ``(size,)``.

        Raises:
            InputError: if the vector does not fit, or the loss is no scalar.
        """
        check_vector(vector, self)
        tangents = self.flat.split(vector)
        product = _PRODUCTS[self.curvature]
        return self._mean(lambda inputs, targets: product(self.flat, self._loss(targets), inputs, tangents))

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, ``(size,)``: the right-hand side of a Newton step."""

        def of_batch(inputs: Tensor, targets: Tensor) -> tuple[int, Parameters]:
            loss = self._loss(targets)
            outputs, pull = pullback(lambda given: self.flat(given, inputs), self.flat.parameters())
            return len(outputs), pull(grad(loss)(outputs))

        return self._mean(of_batch)

    def dense(self) -> Tensor:
        """Return the matrix ``(size, size)``, by one product a column.

        Raises:
            InputError: if it has more than 10,000 rows.
        """
        return dense_matrix(self)

    def _loss(self, targets: Tensor) -> Callable[[Tensor], Tensor]:
        def loss(outputs: Tensor) -> Tensor:
            value = self.loss_function(outputs, targets)
            if value.ndim:
                raise InputError(f"the loss must be a scalar, the mean over a batch, got shape {tuple(value.shape)}")
            return value

        return loss

    def _mean(self, of_batch: Callable[[Tensor, Tensor], tuple[int, Parameters]]) -> Tensor:
        """Average what is a mean over each batch over all examples."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        examples = 0
        for inputs, targets in self.batches:
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            if not self._checked:
                self.flat.check_deterministic(inputs)
            if self.curvature == "empirical_fisher":
                self.flat.check_independent()
            self._checked = True
            count, parts = of_batch(inputs, targets)
            total.add_(self.flat.join(parts), alpha=count)
            examples += count
        if examples == 0:
            raise InputError("batches hold no example; give at least one (inputs, targets)")
        return total.div_(examples)


def _hessian(flat: FlatModule, loss: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Parameters) -> tuple[int, Parameters]:
    examples = 0

    def of_parameters(given: Parameters) -> Tensor:
        nonlocal examples
        outputs = flat(given, inputs)
        examples = len(outputs)
        return loss(outputs)

    _, curve = pullback(grad(of_parameters), flat.parameters())
    return examples, curve(tangents)


def _gauss_newton(
    flat: FlatModule, loss: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Parameters
) -> tuple[int, Parameters]:
    outputs, pushed, pull = _linearized(flat, inputs, tangents)
    _, curve = pullback(grad(loss), outputs)
    return len(outputs), pull(curve(pushed))


def _empirical_fisher(
    flat: FlatModule, loss: Callable[[Tensor], Tensor], inputs: Tensor, tangents: Parameters
) -> tuple[int, Parameters]:
    outputs, pushed, pull = _linearized(flat, inputs, tangents)
    gradients = grad(loss)(outputs).flatten(1) if outputs.ndim > 1 else grad(loss)(outputs).unsqueeze(1)
    # A row of these is an example's own gradient, divided by the examples: of the two in a product one division must go.
    along = len(outputs) * (gradients * pushed.reshape(gradients.shape)).sum(1, keepdim=True)
    return len(outputs), pull((gradients * along).view_as(outputs))


def _linearized(flat: FlatModule, inputs: Tensor, tangents: Parameters) -> tuple[Tensor, Tensor, Callable[[Tensor], Parameters]]:
    """Return the outputs, ``J v``, and the map of ``u`` to ``J^T u``."""

    def of_parameters(given: Parameters) -> Tensor:
        return flat(given, inputs)

    pushed = jvp(of_parameters, (flat.parameters(),), (tangents,))[1]
    outputs, pull = pullback(of_parameters, flat.parameters())
    return outputs, pushed, pull


_PRODUCTS = {
    "hessian": _hessian,
    "gauss_newton": _gauss_newton,
    "fisher": _gauss_newton,
    "empirical_fisher": _empirical_fisher,
}
