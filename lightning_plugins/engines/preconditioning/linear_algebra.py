"""Inverses that do not fail silently.

The ladder of a matrix that Cholesky refuses: twice the ridge, up to five times; then float64; then None, and the caller keeps
what it had.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DOUBLINGS = 5


@dataclass
class Trouble:
    """What factorisations went through: counted, to be logged."""

    doubled_ridges: int = 0
    float64_retries: int = 0
    kept_inverses: int = 0


def _factor(matrix: Tensor, ridge: Tensor) -> Tensor | None:
    factor = matrix.clone().mT  # symmetric, and LAPACK wants columns: it can work in place
    factor.diagonal(dim1=-2, dim2=-1).add_(ridge)
    info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return None if bool(info.any()) or not bool(factor.diagonal(dim1=-2, dim2=-1).isfinite().all()) else factor


def damped_cholesky(matrix: Tensor, ridge: Tensor, trouble: Trouble) -> Tensor | None:
    """Return the lower Cholesky factor of ``matrix + ridge I``, or None where the whole ladder failed.

    Args:
        matrix: symmetric ``(..., d, d)``; left as it is.
        ridge: ``(..., 1)``, broadcast over the diagonal.
        trouble: counts the rungs that were used.
    """
    factor = _factor(matrix, ridge)
    for doubling in range(1, DOUBLINGS + 1):
        if factor is not None:
            return factor
        trouble.doubled_ridges += 1
        factor = _factor(matrix, ridge * 2.0**doubling)
    if factor is None and matrix.dtype != torch.float64:
        trouble.float64_retries += 1
        exact = _factor(matrix.double(), ridge.double() * 2.0**DOUBLINGS)
        factor = None if exact is None else exact.to(matrix.dtype)
    if factor is None:
        trouble.kept_inverses += 1
    return factor


def damped_inverse(matrix: Tensor, ridge: Tensor, trouble: Trouble) -> Tensor | None:
    """Return ``(matrix + ridge I)^-1`` as a full symmetric matrix, or None; see :func:`damped_cholesky`."""
    factor = damped_cholesky(matrix, ridge, trouble)
    return None if factor is None else torch.cholesky_inverse(factor)


def divided(rows: Tensor, factor: Tensor) -> Tensor:
    """Return ``rows (L L^T)^-1`` for rows ``(..., m, d)`` and lower Cholesky factors ``(..., d, d)``, broadcast."""
    half = torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def symmetric_eigenvalues(matrix: Tensor, trouble: Trouble) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues (ascending, floored at 0) and eigenvectors (columns), or None where float64 fails, too.

    Args:
        matrix: symmetric ``(..., d, d)``.
        trouble: counts the rungs that were used.
    """
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        trouble.float64_retries += dtype != matrix.dtype
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except RuntimeError:  # torch.linalg.LinAlgError is one, and is not typed
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.clamp_min(0.0).to(matrix.dtype), vectors.to(matrix.dtype)
    trouble.kept_inverses += 1
    return None
