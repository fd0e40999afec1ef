"""Solving ``(A + damping I) x = b`` by products alone: preconditioned conjugate gradients.

The matrix must be positive definite on the directions that are met. One along which it is not (a Hessian has them) stops the
solve: the iterate so far still minimises the quadratic over the directions before it, and the direction itself is returned, for
it leads downhill without end.

Papers: Hestenes and Stiefel, 1952; Martens, "Deep Learning via Hessian-free Optimization", ICML 2010. Cost: a product a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis.operators import LinearOperator, check_vector
from lightning_plugins.engines.preconditioning.settings import check_count, check_positive

Outcome = Literal["converged", "iteration limit", "non-positive direction"]


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients came to.

    Attributes:
        x: ``(size,)``, the last iterate.
        outcome: ``converged``, ``iteration limit`` or ``non-positive direction``.
        iterations: products taken.
        residuals: norms of ``b - (A + damping I) x`` relative to that of ``b``, before the first step and after each.
        direction: ``(size,)``, along which the matrix is not positive, or None.
    """

    x: Tensor
    outcome: Outcome
    iterations: int
    residuals: list[float]
    direction: Tensor | None = None


def conjugate_gradients(
    operator: LinearOperator,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
) -> Solution:
    """Solve ``(A + damping I) x = b``, from 0.

    Args:
        operator: ``A``, symmetric.
        b: ``(size,)``.
        damping: added to the diagonal, 0 or more.
        preconditioner: maps a residual ``r`` to ``M^-1 r`` for a symmetric positive definite ``M`` near the matrix.
        tolerance: on the norm of the residual, relative to that of ``b``.
        max_iterations: the operator's size by default.

    Raises:
        InputError: for a value out of range, a ``b`` that does not fit, a product that is not finite, or a preconditioner that
            is not positive definite.
    """
    check_vector(b, operator)
    check_positive("tolerance", tolerance)
    limit = operator.size if max_iterations is None else max_iterations
    check_count("max_iterations", limit)
    if damping < 0:
        raise InputError(f"damping must be 0 or more, got {damping}")
    x, residual = torch.zeros_like(b), b.clone()
    norm = float(b.norm())
    if norm == 0:
        return Solution(x, "converged", 0, [0.0])
    residuals = [1.0]
    direction, inner = torch.zeros_like(b), 1.0
    for iteration in range(limit):
        if residuals[-1] <= tolerance:
            return Solution(x, "converged", iteration, residuals)
        preconditioned = residual if preconditioner is None else preconditioner(residual)
        previous, inner = inner, float(residual @ preconditioned)
        if not inner > 0:
            raise InputError(
                f"the preconditioner must be symmetric positive definite, got r^T M^-1 r = {inner}; add damping to its factors"
            )
        direction = preconditioned + (inner / previous if iteration else 0.0) * direction
        image = operator.matvec(direction) + damping * direction
        curvature = float(direction @ image)
        if curvature != curvature:
            raise InputError("a product of the operator holds NaN or infinity; check the module's parameters and the data")
        if curvature <= 0:
            return Solution(x, "non-positive direction", iteration + 1, residuals, direction)
        step = inner / curvature
        x = x + step * direction
        residual = residual - step * image
        residuals.append(float(residual.norm()) / norm)
    return Solution(x, "converged" if residuals[-1] <= tolerance else "iteration limit", limit, residuals)
