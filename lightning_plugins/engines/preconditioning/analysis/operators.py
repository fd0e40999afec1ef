"""Symmetric linear operators: a matrix known by its products with vectors."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError

# A dense matrix of this many rows takes 800 MB in float64, and as many products as rows.
DENSE_LIMIT = 10_000


class LinearOperator(Protocol):
    """A symmetric matrix of ``size`` rows, known by what it makes of vectors."""

    @property
    def size(self) -> int:
        """Rows, and columns."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""

    @property
    def device(self) -> torch.device:
        """Of the vectors."""

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector ``(size,)``."""


class MatrixOperator:
    """A matrix that is at hand.

    Args:
        matrix: symmetric ``(n, n)``.

    Raises:
        InputError: if it is no square matrix.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"the matrix must be square, (n, n), got shape {tuple(matrix.shape)}")
        self.matrix = matrix
        self.size = matrix.shape[0]
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector ``(size,)``."""
        return self.matrix @ vector


def dense_matrix(operator: LinearOperator) -> Tensor:
    """Return an operator as a matrix ``(size, size)``, by one product a column.

    Raises:
        InputError: if it has more than ``DENSE_LIMIT`` rows.
    """
    if operator.size > DENSE_LIMIT:
        raise InputError(
            f"a dense matrix of {operator.size} rows is refused, at most {DENSE_LIMIT} are made; use matvec, top_eigenpairs or "
            "spectral_density, which need products alone"
        )
    columns = []
    for index in range(operator.size):
        unit = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        unit[index] = 1.0
        columns.append(operator.matvec(unit))
    return torch.stack(columns, dim=1)


def check_vector(vector: Tensor, operator: LinearOperator) -> None:
    """Refuse a vector that an operator cannot be multiplied with."""
    given = (tuple(vector.shape), vector.dtype, vector.device)
    valid = ((operator.size,), operator.dtype, operator.device)
    if given != valid:
        names = ("shape", "dtype", "device")
        said = [", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)) for values in (given, valid)]
        raise InputError(f"the vector has {said[0]}, and the operator takes {said[1]}; reshape it or move it with .to()")


def random_columns(operator: LinearOperator, columns: int, generator: torch.Generator | None, *, signs: bool = False) -> Tensor:
    """Draw ``(size, columns)``: standard normal, or signs of equal chance.

    They are drawn on the generator's device and moved, so that one on the CPU gives the same on every device.
    """
    device = torch.device("cpu") if generator is None else generator.device
    shape = (operator.size, columns)
    if signs:
        drawn = torch.randint(0, 2, shape, generator=generator, device=device).mul_(2).sub_(1).to(operator.dtype)
    else:
        drawn = torch.randn(shape, generator=generator, device=device, dtype=operator.dtype)
    return drawn.to(operator.device)
