"""The empirical neural tangent kernel, and what a network would predict if it trained in it.

    K[n, m, i, j] = sum_p  (d f_i(x_n) / d theta_p) (d f_j(x_m) / d theta_p)

for outputs ``i, j`` of examples ``n, m``, over the trainable parameters as they are. *Direct* builds both Jacobians; *implicit*
multiplies with the kernel by one backward and one forward-mode pass, ``K v = J (J^T v)``, and never holds a Jacobian.

Papers: Jacot, Gabriel and Hongler, 2018; Novak, Sohl-Dickstein and Schoenholz, "Fast Finite Width Neural Tangent Kernel",
ICML 2022 (the two computations). Cost of the direct form: a backward pass per example and output, and memory for
``examples * outputs * parameters``; of the implicit one: two passes a product.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis.flat_module import FlatModule, Parameters, pullback
from lightning_plugins.engines.preconditioning.analysis.operators import check_vector, dense_matrix
from lightning_plugins.engines.preconditioning.settings import check_choice

Outputs = Literal["full", "class_wise"]


def tangent_kernel(module: nn.Module, inputs: Tensor, others: Tensor | None = None, *, outputs: Outputs = "full") -> Tensor:
    """Return the kernel between examples, from their Jacobians.

    Args:
        module: in evaluation mode where it has batch norms or dropout; its outputs are flattened to C values an example.
        inputs: N examples.
        others: M examples; the same ones by default.
        outputs: ``full`` keeps every pair of outputs, ``class_wise`` those of an output with itself.

    Returns:
        ``(N, M, C, C)``, or ``(C, N, M)`` of ``class_wise``.

    Raises:
        InputError: if examples depend on each other or on random numbers.
    """
    check_choice("outputs", outputs, ("full", "class_wise"))
    flat = _checked(module, inputs)
    left = _jacobians(flat, inputs)
    right = left if others is None else _jacobians(flat, others)
    formula = "nip,mjp->nmij" if outputs == "full" else "nip,mip->inm"
    return torch.stack([torch.einsum(formula, left[name], right[name]) for name in left]).sum(0)


class TangentKernelOperator:
    """The kernel ``(N C, N C)`` of N examples by products, for eigenvalues, densities and solves; see ``LinearOperator``.

    Args:
        module: see :func:`tangent_kernel`.
        inputs: N examples; the rows are ordered by example, then by output.

    Attributes:
        size: ``N C``.
        dtype: of the parameters.
        device: of the parameters; the inputs are moved there.

    Raises:
        InputError: if examples depend on each other or on random numbers.
    """

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self.flat = _checked(module, inputs)
        self.inputs = inputs.to(self.flat.device)
        with torch.no_grad():
            self.shape = self.flat(self.flat.parameters(), self.inputs).shape
        self.size, self.dtype, self.device = self.shape.numel(), self.flat.dtype, self.flat.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector ``(size,)``.

        Raises:
            InputError: if the vector does not fit.
        """
        check_vector(vector, self)
        return self.pushed(self.pulled(vector), self.inputs).flatten()

    def pulled(self, vector: Tensor) -> Parameters:
        """Return ``J^T v``, by parameter."""
        _, pull = pullback(lambda given: self.flat(given, self.inputs), self.flat.parameters())
        return pull(vector.view(self.shape))

    def pushed(self, tangents: Parameters, inputs: Tensor) -> Tensor:
        """Return ``J w`` for other inputs: how the outputs move when the parameters do, ``(M, ...)``."""
        return jvp(lambda given: self.flat(given, inputs), (self.flat.parameters(),), (tangents,))[1]

    def dense(self) -> Tensor:
        """Return the kernel ``(size, size)``, by one product a column.

        Raises:
            InputError: if it has more than 10,000 rows.
        """
        return dense_matrix(self)


def kernel_eigenvalues(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the eigenvalues of the full kernel, ascending, ``(N C,)``: those of ``J J^T``, so also of ``J^T J`` above 0.

    Raises:
        InputError: if examples depend on each other or on random numbers, or ``N C`` is above 10,000.
    """
    return torch.linalg.eigvalsh(TangentKernelOperator(module, inputs).dense())


def kernel_regression(module: nn.Module, inputs: Tensor, targets: Tensor, queries: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Predict what gradient flow on the squared error ends at, were the network linear in its parameters.

        f(x) + K(x, X) (K(X, X) + ridge I)^-1 (y - f(X))

    Args:
        module: see :func:`tangent_kernel`.
        inputs: N training examples X; ``N C`` is at most 10,000, for the kernel is solved densely.
        targets: y, of the outputs' shape.
        queries: M examples x.
        ridge: added to the kernel's diagonal, 0 or more.

    Returns:
        ``(M, ...)``, as the module's outputs.

    Raises:
        InputError: if the targets do not fit or the kernel is singular.
    """
    if ridge < 0:
        raise InputError(f"ridge must be 0 or more, got {ridge}")
    operator = TangentKernelOperator(module, inputs)
    if targets.shape != operator.shape:
        raise InputError(f"targets must have the outputs' shape, {tuple(operator.shape)}, got {tuple(targets.shape)}")
    queries = queries.to(operator.device)
    with torch.no_grad():
        start, at_queries = (operator.flat(operator.flat.parameters(), x) for x in (operator.inputs, queries))
    kernel = operator.dense()
    kernel.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(kernel)
    if bool(info):
        raise InputError(f"the kernel of these {len(inputs)} examples plus ridge {ridge} is singular; give a larger ridge")
    missing = (targets.to(start) - start).flatten()
    coefficients = torch.cholesky_solve(missing[:, None], factor)[:, 0]
    return at_queries + operator.pushed(operator.pulled(coefficients), queries)


def _checked(module: nn.Module, inputs: Tensor) -> FlatModule:
    flat = FlatModule(module)
    flat.check_independent()
    flat.check_deterministic(inputs.to(flat.device))
    return flat


def _jacobians(flat: FlatModule, inputs: Tensor) -> Parameters:
    """Return d output / d parameter of each example, by name: ``(N, C, scalars)``."""

    def single(given: Parameters, x: Tensor) -> Tensor:
        return flat(given, x.unsqueeze(0)).flatten()

    jacobians = vmap(jacrev(single), in_dims=(None, 0))(flat.parameters(), inputs.to(flat.device))
    return {name: jacobian.flatten(2) for name, jacobian in jacobians.items()}
