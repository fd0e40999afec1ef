"""Operations and memory of each method, from shapes alone.

With M rows (examples times positions) of I inputs and O outputs, and factors of whole width:

    training     6 M O I             forward 2, backward 4
    K-FAC        statistics 2 M (I^2 + O^2)     refresh I^3 + O^3     apply 2 O I (I + O)

so applying costs ``(I + O) / (3 M)`` of a training step, however rarely the rest is done. Counted are products of matrices and
factorisations, multiplication and addition each as one: of ``d x d``, Cholesky ``d^3 / 3``, the inverse from its factor
``2 d^3 / 3``, a triangular solve of m rows ``m d^2``, eigenvectors ``9 d^3``, QR ``8 d^3 / 3`` (Golub and Van Loan, Matrix
Computations). Second moments are counted in full, though a CPU makes little more than the triangle of wide ones. Work on single
entries is left out: it is bound by memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.layers import Layer
from lightning_plugins.engines.preconditioning.matrices import working_shape

CHOLESKY, CHOLESKY_INVERSE, EIGH, QR = 1 / 3, 2 / 3, 9.0, 8 / 3


@dataclass(frozen=True)
class Seen:
    """What a batch brings to a weight, over all modules and calls that use it.

    Attributes:
        layer: of the first of those modules.
        examples: N.
        rows: ``N R`` over all calls; of a norm, whose positions are summed up first, N.
        averaged: rows where positions are averaged first, N a call.
    """

    layer: Layer
    examples: int = 0
    rows: int = 0
    averaged: int = 0

    @property
    def training_flop(self) -> float:
        """Forward and backward; lookups and norms have no products of matrices."""
        return 0.0 if self.layer.kind in ("embedding", "norm") else 6.0 * self.rows * math.prod(self.layer.shape)


class Counts(NamedTuple):
    """Operations of an observation, a refresh and a step; numbers kept from step to step."""

    statistics: float
    refresh: float
    apply: float
    numbers: int


def pieces_of(width: int, limit: int) -> tuple[int, int]:
    """Return the number and the width of the blocks that an axis is split into."""
    pieces = math.ceil(width / limit)
    return pieces, math.ceil(width / pieces)


# Of layers: what was seen, the method's settings, the Fisher type, and the backward passes of an observation.


def _kfac(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    """With ``inverse_every=1`` K-FAC solves with the factor of ``A``, and saves the inverse of it: ``2 I^3 / 3`` less."""
    blocks, out_dim, in_dim = seen.layer.shape
    rows = seen.averaged if settings.positions == "reduce" else seen.rows
    embedding = seen.layer.kind == "embedding"
    in_pieces, i = (1, in_dim) if embedding else pieces_of(in_dim, settings.max_dim)
    out_pieces, o = pieces_of(out_dim, settings.max_dim)
    entries = blocks * out_pieces * o * in_pieces * i
    square = blocks * in_pieces * i * i
    solve = CHOLESKY + CHOLESKY_INVERSE
    counts = Counts(0.0, 0.0, 0.0, 2 * in_dim)
    if not embedding:
        counts = Counts(2.0 * rows * square, solve * square * i, 2.0 * entries * i, 2 * square)
    if fisher == "forward":
        return counts
    square = blocks * out_pieces * o * o
    return Counts(
        counts.statistics + passes * 2.0 * rows * square,
        counts.refresh + solve * square * o,
        counts.apply + 2.0 * entries * o,
        counts.numbers + 2 * square,
    )


def _foof(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    return _kfac(seen, settings, "forward", passes)


def _ekfac(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    """Factors as of K-FAC; rows or whole ``P_n`` are turned into the bases, and squared; moments turn at each refresh."""
    factors = _kfac(seen, settings, fisher, passes)
    blocks, out_dim, in_dim = seen.layer.shape
    out_pieces, o = pieces_of(out_dim, settings.max_dim)
    square = blocks * out_pieces * o * o
    if seen.layer.kind == "embedding":  # its input side is diagonal already
        entries = out_pieces * o * in_dim
        refresh = (EIGH + 2.0) * square * o + 2.0 * entries * o
        return Counts(
            factors.statistics + passes * 2.0 * seen.rows * square, refresh, 4.0 * entries * o, 2 * square + in_dim + entries
        )
    in_pieces, i = pieces_of(in_dim, settings.max_dim)
    input_square, entries = blocks * in_pieces * i * i, blocks * out_pieces * o * in_pieces * i
    if seen.rows * (in_dim**2 + out_dim**2) <= seen.examples * in_dim * out_dim * (in_dim + out_dim):
        turned = 2.0 * seen.rows * (input_square + square + entries)
    else:
        turned = 2.0 * seen.rows * blocks * out_dim * in_dim
        turned += 2.0 * seen.examples * (blocks * out_dim * in_pieces * i * i + entries * o)
    refresh = (EIGH + 2.0) * (input_square * i + square * o) + 2.0 * entries * (i + o)
    return Counts(factors.statistics + passes * turned, refresh, 4.0 * entries * (i + o), factors.numbers + entries)


def _diag(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    entries = math.prod(seen.layer.shape)
    products = 0.0 if seen.layer.kind == "embedding" else 2.0 * seen.rows * entries
    return Counts(passes * products, 0.0, 0.0, 2 * entries)


def _unit(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    blocks, out_dim, in_dim = seen.layer.shape
    pieces, i = pieces_of(in_dim, settings.max_dim)
    square = blocks * out_dim * pieces * i * i
    products = 2.0 * seen.rows * math.prod(seen.layer.shape) + 2.0 * seen.examples * square
    return Counts(passes * products, (CHOLESKY + CHOLESKY_INVERSE) * square * i, 2.0 * square, 2 * square)


def _full(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    """A layer's part in a Gram matrix of the examples, by rows or by gradients, whichever is less."""
    blocks, out_dim, in_dim = seen.layer.shape
    examples, rows, entries = passes * seen.examples, passes * seen.rows, math.prod(seen.layer.shape)
    if seen.layer.kind == "embedding":
        return Counts(2.0 * rows**2 * out_dim, 0.0, 0.0, 0)
    by_rows, by_gradients = blocks * rows**2 * (in_dim + out_dim), (rows + examples**2) * entries
    return Counts(2.0 * min(by_rows, by_gradients), 0.0, 4.0 * rows * entries, 0)


def _layer(seen: Seen, settings: Any, fisher: str, passes: int) -> Counts:
    own, solve = _full(seen, settings, fisher, passes), gram_solve(passes * seen.examples, fisher)
    return own._replace(refresh=solve.refresh, apply=own.apply + solve.apply)


def gram_solve(examples: int, fisher: str) -> Counts:
    """Return what a Gram matrix takes to factorise and to use: the empirical Fisher's solves twice, and measures its span."""
    return Counts(0.0, CHOLESKY * examples**3, (6.0 if fisher == "empirical" else 2.0) * examples**2, 0)


# Of parameters, for methods that look at gradients alone: the shape and the method's settings.


def _axes(shape: torch.Size, settings: Any, fewest: int = 1) -> tuple[int, list[int]]:
    """Return the entries of a parameter, and the lengths of the axes that have a matrix."""
    axes = working_shape(shape, settings.flatten)
    return math.prod(axes), [length for length in axes if length <= settings.max_dim and len(axes) >= fewest]


def _shampoo(shape: torch.Size, settings: Any) -> Counts:
    if settings.root != "eigh":
        raise InputError("the steps of root='newton' depend on the matrices; count root='eigh'")
    entries, axes = _axes(shape, settings)
    products = sum(2.0 * entries * length for length in axes)
    graft = {"none": 0, "sgd": 0, "adagrad": 1, "rmsprop": 1, "adam": 2}[settings.graft] * entries
    refresh = sum((EIGH + 2.0) * length**3 for length in axes)
    return Counts(products, refresh, products, sum(2 * length**2 for length in axes) + graft)


def _soap(shape: torch.Size, settings: Any) -> Counts:
    """A refresh is that by QR; the very first takes eigenvectors instead."""
    entries, axes = _axes(shape, settings, fewest=2)
    products = sum(2.0 * entries * length for length in axes)
    refresh = sum((QR + 2.0) * length**3 for length in axes) + 2.0 * products
    return Counts(products, refresh, 2.0 * products, sum(2 * length**2 for length in axes) + 2 * entries)


def _psgd(shape: torch.Size, settings: Any) -> Counts:
    """Fitting an axis: a product, a solve, two second moments, six products for their norm, and their difference times Q."""
    entries, axes = _axes(shape, settings)
    diagonal = sum(working_shape(shape, settings.flatten)) - sum(axes)
    fit = sum(7.0 * entries * length + 2.0 * length**3 + 12.0 * entries for length in axes)
    numbers = sum(2 * length**2 for length in axes) + 2 * diagonal
    return Counts(fit, sum(2.0 * length**3 for length in axes), sum(2.0 * entries * length for length in axes), numbers)


def _muon(shape: torch.Size, settings: Any) -> Counts:
    short, long = sorted(working_shape(shape, True))
    return Counts(0.0, 0.0, settings.iterations * (4.0 * short**2 * long + 2.0 * short**3), short * long)


LAYER_FORMULAS: dict[str, Callable[[Seen, Any, str, int], Counts]] = {
    "kfac": _kfac, "foof": _foof, "ekfac": _ekfac, "diag": _diag, "unit": _unit, "full": _full, "layer": _layer,
}  # fmt: skip
PARAMETER_FORMULAS: dict[str, Callable[[torch.Size, Any], Counts]] = {
    "shampoo": _shampoo, "soap": _soap, "psgd": _psgd, "muon": _muon,
}  # fmt: skip
