"""Inverse p-th roots of symmetric matrices, and eigenbases that follow a slowly changing one.

    eigh            (M + e l I)^(-1/p) = U (L + e l)^(-1/p) U^T                 l: the largest eigenvalue
    coupled Newton  z = (1 + p) / (2 |M|_F),  X = z^(1/p) I,  N = z M;
                    T = ((p + 1) I - N) / p,  X <- X T,  N <- T^p N   until   N = I,  X = M^(-1/p)
    warm QR         Q <- qr(M Q) with the columns sorted: one step of orthogonal iteration

Sources: Guo and Higham, "A Schur-Newton method for the matrix p-th root and its inverse", 2006; Anil et al., "Scalable
Second-Order Optimization for Deep Learning", 2020 (coupled Newton); Vyas et al., "SOAP", 2024 (warm QR). The ridge is added to a
copy: statistics that keep it would grow with every refresh.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, symmetric_eigenvalues

Root = Literal["eigh", "newton"]
ROOTS = ("eigh", "newton")

_NEWTON_STEPS = 60
# Above this distance of N from I the root would be wrong in its second digit.
_NEWTON_ACCEPTED = 1e-2
_POWER_STEPS = 32


def inverse_root(matrix: Tensor, order: int, epsilon: float, root: Root, trouble: Trouble) -> Tensor | None:
    """Return ``(matrix + epsilon l I)^(-1 / order)``, or None where it cannot be computed in float64 either.

    The root of a matrix of zeros, of which nothing is known, is the identity.

    Args:
        matrix: symmetric positive semi-definite ``(d, d)``; left as it is.
        order: p, 1 or more.
        epsilon: ridge relative to the largest eigenvalue ``l``.
        root: ``eigh``, or ``newton``, which has matrix products alone and takes ``l`` from a power iteration; where it does not
            converge, ``eigh``.
        trouble: counts retries and failures.
    """
    if not bool(matrix.isfinite().all()):
        trouble.kept_inverses += 1
        return None
    if not bool(matrix.any()):
        return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (_root_by_eigh if root == "eigh" else _root_by_newton)(matrix, order, epsilon, trouble)


def eigenbasis(matrix: Tensor, trouble: Trouble) -> Tensor | None:
    """Return eigenvectors as columns, those of the largest eigenvalues first, or None where float64 fails, too."""
    pairs = symmetric_eigenvalues(matrix, trouble) if bool(matrix.isfinite().all()) else None
    return None if pairs is None else pairs[1].flip(-1)


def turned_basis(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis after one step of orthogonal iteration towards the eigenvectors of ``matrix``, and the order of its columns.

    Args:
        matrix: symmetric ``(d, d)``.
        basis: orthogonal ``(d, d)``, close to the eigenvectors.

    Returns:
        The new basis, and indices ``(d,)`` of the old columns that its columns continue: largest Rayleigh quotient first.
    """
    product = matrix @ basis
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(product[:, order]).Q, order


def _root_by_eigh(matrix: Tensor, order: int, epsilon: float, trouble: Trouble) -> Tensor | None:
    pairs = symmetric_eigenvalues(matrix, trouble)
    if pairs is None:
        return None
    values, vectors = pairs
    return (vectors * (values + epsilon * values[-1]).pow(-1.0 / order)) @ vectors.mT


def _root_by_newton(matrix: Tensor, order: int, epsilon: float, trouble: Trouble) -> Tensor | None:
    damped = matrix.clone()
    damped.diagonal().add_(epsilon * _largest_eigenvalue(damped))
    found = _coupled_newton(damped, order)
    # A matrix that rounding has made indefinite beyond its ridge has no root; eigenvalues can be floored.
    return _root_by_eigh(matrix, order, epsilon, trouble) if found is None else found


def _coupled_newton(matrix: Tensor, order: int) -> Tensor | None:
    """Iterate until rounding stops the progress; None where that happens far from the root."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    z = (1 + order) / (2 * torch.linalg.matrix_norm(matrix))
    root, coupled = identity * z.pow(1.0 / order), matrix * z
    best, distance = root, float("inf")
    for _ in range(_NEWTON_STEPS):
        now = float((coupled - identity).abs().max())
        # Far from I the distance may stand still for many steps; close to it, it falls until rounding makes it rise.
        stands_still = distance < _NEWTON_ACCEPTED and now >= distance
        if stands_still or not math.isfinite(now):
            break
        best, distance = root, now
        step = ((order + 1) * identity - coupled) / order
        root = root @ step
        coupled = torch.linalg.matrix_power(step, order) @ coupled
        coupled = (coupled + coupled.mT) / 2
    return best if distance < _NEWTON_ACCEPTED else None


def _largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return an estimate from below by power iteration, from the longest column: it is the same at each call."""
    vector = matrix[:, int(matrix.norm(dim=0).argmax())]
    for _ in range(_POWER_STEPS):
        vector = matrix @ (vector / vector.norm())
    return vector.norm()
