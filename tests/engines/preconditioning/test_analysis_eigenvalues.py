"""Oracle: torch.linalg.eigh of the dense matrix."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis import CurvatureOperator, MatrixOperator, top_eigenpairs


def symmetric(values, seed=0):
    """A matrix of given eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return (basis * values) @ basis.T


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_equals_the_dense_eigenvalues(which):
    values = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = symmetric(values)
    pairs = top_eigenpairs(MatrixOperator(matrix), 5, which=which, tolerance=1e-9, generator=torch.Generator().manual_seed(3))
    order = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort()
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[order[:5]], rtol=0, atol=1e-12)
    residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-3, atol=1e-13)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_finds_an_eigenvalue_as_often_as_it_occurs():
    pairs = top_eigenpairs(MatrixOperator(symmetric([7.0] * 3 + [5.0] * 2 + [1.0 / k for k in range(1, 80)])), 5, tolerance=1e-9)
    torch.testing.assert_close(pairs.values, torch.tensor([7.0, 7, 7, 5, 5], dtype=torch.float64), rtol=0, atol=1e-9)


def test_restarts_keep_what_was_found():
    values = torch.cat([torch.linspace(0, 1, 600, dtype=torch.float64), torch.tensor([1.01, 1.02], dtype=torch.float64)])
    pairs = top_eigenpairs(MatrixOperator(symmetric(values)), 2, tolerance=1e-8, generator=torch.Generator().manual_seed(0))
    assert pairs.converged
    assert pairs.products > 40  # more than the basis holds: it was restarted
    torch.testing.assert_close(pairs.values, torch.tensor([1.02, 1.01], dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_linear_layers_gauss_newton_matrix_has_each_eigenvalue_once_per_output():
    torch.manual_seed(0)
    inputs = torch.randn(50, 6, dtype=torch.float64)
    module = nn.Linear(6, 3, bias=False).double()
    operator = CurvatureOperator(module, functional.mse_loss, [(inputs, torch.zeros(50, 3, dtype=torch.float64))])
    one_output = torch.linalg.eigvalsh(inputs.T @ inputs / 50 * 2 / 3).flip(0)
    pairs = top_eigenpairs(operator, 6, tolerance=1e-9)
    torch.testing.assert_close(pairs.values, one_output[:2].repeat_interleave(3), rtol=0, atol=1e-10)


def test_every_pair_of_a_small_matrix_and_of_a_zero_one():
    values = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    pairs = top_eigenpairs(MatrixOperator(symmetric(values)), 3, tolerance=1e-12)
    torch.testing.assert_close(pairs.values, torch.tensor([3.0, 0.5, -1.0], dtype=torch.float64), rtol=0, atol=1e-13)
    assert pairs.products == 3
    nothing = top_eigenpairs(MatrixOperator(torch.zeros(20, 20)), 2)
    assert nothing.converged
    assert nothing.values.tolist() == [0.0, 0.0]


def test_single_precision_reaches_its_own_precision():
    values = torch.linspace(0, 1, 300, dtype=torch.float64).square()
    pairs = top_eigenpairs(MatrixOperator(symmetric(values).float()), 3, tolerance=1e-5)
    assert pairs.converged
    assert pairs.values.dtype == torch.float32
    torch.testing.assert_close(pairs.values.double(), values[-3:].flip(0), rtol=0, atol=2e-5)


def test_gives_up_after_its_products_and_says_so():
    matrix = symmetric(torch.linspace(0, 1, 400, dtype=torch.float64))
    pairs = top_eigenpairs(MatrixOperator(matrix), 2, tolerance=1e-12, max_products=10)
    assert not pairs.converged
    assert pairs.products <= 12
    residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residuals, residuals)


def test_a_generator_makes_it_repeatable():
    operator = MatrixOperator(symmetric(torch.linspace(0, 1, 90, dtype=torch.float64)))
    one, two = (top_eigenpairs(operator, 2, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be a whole number of 1 or more, got 0"),
        ({"count": 4}, "count must be at most the operator's size, 3, got 4"),
        ({"which": "middle"}, "which must be one of largest, smallest, magnitude, got 'middle'"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        top_eigenpairs(MatrixOperator(torch.eye(3)), **options)


def test_what_is_not_finite_or_not_square_is_refused():
    with pytest.raises(InputError, match="NaN or infinity"):
        top_eigenpairs(MatrixOperator(torch.full((3, 3), float("nan"))))
    with pytest.raises(InputError, match=r"must be square, \(n, n\), got shape \(2, 3\)"):
        MatrixOperator(torch.ones(2, 3))
