"""The outermost eigenpairs of a symmetric operator, by block Lanczos with restarts.

    Q  <-  [Q, orthonormal part of the residuals A x - theta x of the pairs that are not done]
    theta, S  <-  eigenpairs of Q^T A Q,  x = Q S

Every new vector is orthogonalised twice against the whole basis, so no copies of a found eigenvalue appear. A basis that is full
shrinks to its best vectors (thick restart). Blocks as wide as the number of pairs find eigenvalues of that multiplicity, which
one vector never would: a linear layer's Gauss-Newton matrix has every eigenvalue once per output.

Papers: Golub and Underwood, 1977 (blocks); Wu and Simon, 2000 (thick restart). Cost: a product per pair that is not done and
iteration; memory: two bases.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis.operators import LinearOperator, random_columns
from lightning_plugins.engines.preconditioning.settings import check_choice, check_count, check_positive

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True)
class Eigenpairs:
    """What was found.

    Attributes:
        values: ``(count,)``, the outermost first.
        vectors: ``(size, count)``, orthonormal.
        residuals: ``(count,)``, the norms of ``A x - theta x``: each value is within its residual of an eigenvalue.
        products: how many products with the operator were taken.
        converged: whether every residual is within the tolerance.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


def top_eigenpairs(
    operator: LinearOperator,
    count: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = 1e-4,
    max_products: int = 1000,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Return the outermost eigenpairs.

    Args:
        operator: symmetric.
        count: how many.
        which: ``largest`` (rightmost), ``smallest`` (leftmost) or ``magnitude`` (largest absolute).
        tolerance: on the residuals, relative to the largest absolute eigenvalue seen.
        max_products: gives up after so many products, with what was found until then.
        generator: of the first block; None is torch's own.

    Raises:
        InputError: if ``count`` is not between 1 and the operator's size, or a product is not finite.
    """
    check_count("count", count)
    check_choice("which", which, ("largest", "smallest", "magnitude"))
    check_positive("tolerance", tolerance)
    if count > operator.size:
        raise InputError(f"count must be at most the operator's size, {operator.size}, got {count}")
    widest = min(operator.size, max(4 * count, count + 32))
    block = _orthonormal(random_columns(operator, count, generator), None)
    basis, images = block, _images(operator, block)
    products = count
    while True:
        values, rotation = torch.linalg.eigh(_symmetric(basis.mT @ images))
        order = _order(values, which)
        values, rotation = values[order], rotation[:, order]
        vectors, found = basis @ rotation[:, :count], images @ rotation[:, :count]
        errors = found - vectors * values[:count]
        residuals = errors.norm(dim=0)
        open_pairs = residuals > tolerance * values.abs().max()
        if not open_pairs.any() or basis.shape[1] == operator.size or products >= max_products:
            return Eigenpairs(values[:count], vectors, residuals, products, not bool(open_pairs.any()))
        if basis.shape[1] + int(open_pairs.sum()) > widest:
            kept = min(basis.shape[1], max(2 * count, count + 8))
            basis, images = basis @ rotation[:, :kept], images @ rotation[:, :kept]
        block = _orthonormal(errors[:, open_pairs][:, : operator.size - basis.shape[1]], basis)
        if block.shape[1] == 0:  # residuals within rounding of the basis: nothing more can be won
            return Eigenpairs(values[:count], vectors, residuals, products, False)
        products += block.shape[1]
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, _images(operator, block)], dim=1)


def _images(operator: LinearOperator, block: Tensor) -> Tensor:
    images = torch.stack([operator.matvec(column.contiguous()) for column in block.mT], dim=1)
    if not bool(images.isfinite().all()):
        raise InputError("a product of the operator holds NaN or infinity; check the module's parameters and the data")
    return images


def _orthonormal(block: Tensor, basis: Tensor | None) -> Tensor:
    """Return an orthonormal basis of the part of ``block`` that is outside ``basis``."""
    block = block / block.norm(dim=0)
    for _ in range(2):
        if basis is not None:
            block = block - basis @ (basis.mT @ block)
        left, sizes, _ = torch.linalg.svd(block, full_matrices=False)
        block = left[:, sizes > 100 * torch.finfo(block.dtype).eps]
    return block


def _order(values: Tensor, which: Which) -> Tensor:
    if which == "magnitude":
        return values.abs().argsort(descending=True)
    return values.argsort(descending=which == "largest")


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
