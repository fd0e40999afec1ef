"""Inner products of per-example gradients, which are themselves never kept.

    from rows        <P_n, P_m> = sum_rs (a_nr . a_ms) (d_nr . d_ms)       of one position (a a^T) o (d d^T)
    from gradients   <P_n, P_m> entry by entry, some of the outputs at a time

The Gram matrix of a layer is made by whichever takes fewer operations; memory beside it stays within the chunk size. Paper:
Goodfellow, "Efficient per-example gradient computations", 2015 (the first line, for norms). Shapes as in ``layers.py``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_plugins.engines.preconditioning.examples import Examples, Rows
from lightning_plugins.engines.preconditioning.factors import CHUNK_BYTES
from lightning_plugins.engines.preconditioning.linear_algebra import Trouble, damped_cholesky


def add_gram(total: Tensor, examples: Examples) -> None:
    """Add a layer's ``<P_n, P_m>`` to ``total``, in place."""
    layer = examples.layer
    blocks, out_dim, in_dim = layer.shape
    first = next(examples.rows(), None)
    if first is None:
        return
    count, positions = len(total), first.inputs.shape[2]
    from_rows = blocks * (count * positions) ** 2 * (in_dim + out_dim)
    from_gradients = blocks * count * (positions + count) * out_dim * in_dim
    if first.is_embedding or from_rows <= from_gradients:
        _add_gram_of_rows(total, examples)
    else:
        _add_gram_of_gradients(total, examples, layer.shape)


def _add_gram_of_rows(total: Tensor, examples: Examples) -> None:
    for rows in _pieces(examples):
        for others in _pieces(examples):
            if others.first > rows.first:
                continue
            block = (_gram(rows.inputs, others.inputs) * _gram(rows.gradients, others.gradients)).sum((0, 2, 4))
            total[rows.indices, others.indices] += block
            if others.first < rows.first:
                total[others.indices, rows.indices] += block.mT


def _pieces(examples: Examples) -> Iterator[Rows]:
    """Yield rows so few at a time that a square of them stays within the chunk size."""
    for rows in examples.rows():
        size = max(1, int((CHUNK_BYTES / examples.dtype.itemsize / rows.inputs.shape[0]) ** 0.5) // rows.inputs.shape[2])
        for start in range(0, rows.inputs.shape[1], size):
            yield Rows(rows.first + start, rows.inputs[:, start : start + size], rows.gradients[:, start : start + size])


def _gram(rows: Tensor, others: Tensor) -> Tensor:
    """Return all products of rows ``(B, N, R, F)`` with others as ``(B, N, R, M, S)``; tokens' are 1 where they are equal."""
    left, right = rows.flatten(1, 2), others.flatten(1, 2)
    products = left @ right.mT if rows.is_floating_point() else left == right.mT
    return products.view(rows.shape[0], *rows.shape[1:3], *others.shape[1:3])


def _add_gram_of_gradients(total: Tensor, examples: Examples, shape: tuple[int, int, int]) -> None:
    blocks, out_dim, in_dim = shape
    size = max(1, CHUNK_BYTES // (len(total) * blocks * in_dim * examples.dtype.itemsize))
    for start in range(0, out_dim, size):
        width = min(size, out_dim - start)
        flat = torch.zeros(len(total), blocks, width * in_dim, dtype=examples.dtype, device=total.device)
        for rows in examples.rows():
            gradients = rows.gradients[..., start : start + width].mT @ rows.inputs
            flat[rows.indices] = gradients.flatten(2).transpose(0, 1)
        matrix = flat.flatten(1)
        total += matrix @ matrix.mT


def products_with(rows: Rows, gradient: Tensor) -> Tensor:
    """Return ``<P_n, V>`` for ``V`` as ``w_BOI``."""
    if rows.is_embedding:
        return (gradient[0].mT[rows.inputs.squeeze(-1)] * rows.gradients).sum((0, 2, 3))
    seen = rows.inputs.flatten(1, 2) @ gradient.mT  # not by broadcasting, which copies V for every example
    return (seen.view_as(rows.gradients) * rows.gradients).sum((0, 2, 3))


def weighted_sum(rows: Rows, weights: Tensor, in_dim: int) -> Tensor:
    """Return ``sum_n weights_n P_n`` as ``w_BOI``."""
    gradients = (rows.gradients * weights.to(rows.gradients.dtype)[:, None, None]).flatten(1, 2)
    if not rows.is_embedding:
        return gradients.mT @ rows.inputs.flatten(1, 2)
    columns = gradients.new_zeros(in_dim, gradients.shape[-1])
    return columns.index_add_(0, rows.inputs.flatten(), gradients[0]).mT.unsqueeze(0)


def damped_gram(gram: Tensor, damping: float, trouble: Trouble) -> tuple[Tensor | None, float]:
    """Return the Cholesky factor of ``gram + damping I``, or None, and the damping it took: the ladder may double it."""
    doublings = trouble.doubled_ridges
    factor = damped_cholesky(gram, gram.new_full((1,), damping), trouble)
    return factor, damping * 2.0 ** (trouble.doubled_ridges - doublings)
