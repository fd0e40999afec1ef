"""Parameters as matrices and tensors: which axes a method sees, and products along one of them.

A parameter becomes a matrix of its first axis against the others ("flatten"), or keeps its axes without those of length 1; a
vector and a scalar have one axis. With ``T_(i)`` the matrix whose rows run over axis i:

    add_moment_    S <- kept S + taken T_(i) T_(i)^T, above the diagonal      multiply_axis    T'_(i) = M T_(i)
"""

import math

import torch
from torch import Tensor, nn

from lightning_plugins.engines.preconditioning.factors import strips


def working_shape(shape: torch.Size, flatten: bool) -> tuple[int, ...]:
    """Return the axes under which a parameter is preconditioned.

    Args:
        shape: of the parameter.
        flatten: whether three and more axes become two, the first against the rest.

    Example:
        >>> working_shape(torch.Size((64, 16, 3, 3)), True), working_shape(torch.Size((64, 1, 3)), False)
        ((64, 144), (64, 3))
    """
    if len(shape) < 2:
        return (math.prod(shape),)
    if flatten:
        return (shape[0], math.prod(shape[1:]))
    return tuple(length for length in shape if length > 1) or (1,)


def add_moment_(statistic: Tensor, tensor: Tensor, axis: int, *, kept: float, taken: float) -> None:
    """Make the upper triangle of ``statistic``, ``(d, d)``, ``kept`` times itself and ``taken`` times ``T_(i) T_(i)^T``.

    What it leaves below the diagonal means nothing; :func:`symmetric` fills it in. On a CPU wide ones are computed in strips from
    the diagonal on, 5/8 of the work; a GPU prefers one large product.
    """
    rows = axis_rows(tensor, axis)
    for start, stop in strips(len(statistic), statistic.is_cuda):
        statistic[start:stop, start:].addmm_(rows[start:stop], rows[start:].mT, beta=kept, alpha=taken)


def multiply_triangles(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of two upper triangular matrices; what stands below their diagonals must be 0."""
    product = torch.zeros_like(other)
    for start, stop in strips(len(other), other.is_cuda):
        torch.mm(one[start:stop, start:], other[start:, start:], out=product[start:stop, start:])
    return product


def symmetric(statistic: Tensor) -> Tensor:
    """Return the symmetric matrix whose upper triangle ``add_moment_`` has made."""
    return statistic.triu() + statistic.triu(1).mT


def axis_rows(tensor: Tensor, axis: int) -> Tensor:
    """Return ``T_(i)``, ``(d, other entries)``; a view for matrices."""
    if tensor.ndim == 2:
        return tensor.mT if axis else tensor
    return tensor.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)


def multiply_axis(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Return the tensor with ``matrix``, ``(d, d)``, applied along one axis."""
    if axis == tensor.ndim - 1:
        return tensor @ matrix.mT
    if axis == 0:
        return (matrix @ tensor.flatten(1)).view(tensor.shape)
    batched = tensor.reshape(math.prod(tensor.shape[:axis]), tensor.shape[axis], -1)
    return (matrix @ batched).view(tensor.shape)


def no_numbers(parameter: nn.Parameter) -> str:
    """Return why a parameter cannot be preconditioned whatever its shape, or nothing."""
    if not parameter.is_floating_point():
        return f"of type {parameter.dtype}: real floating-point numbers are needed"
    return "" if parameter.numel() else "it is empty"
