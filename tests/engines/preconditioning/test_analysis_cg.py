"""Oracle: torch.linalg.solve."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis import CurvatureOperator, MatrixOperator, conjugate_gradients


def positive(size=50, condition=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    matrix = (basis * torch.logspace(0, torch.tensor(condition).log10(), size, dtype=torch.float64)) @ basis.T
    return matrix, torch.randn(size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_equals_the_dense_solve(damping):
    matrix, b = positive()
    solution = conjugate_gradients(MatrixOperator(matrix), b, damping=damping, tolerance=1e-12, max_iterations=200)
    expected = torch.linalg.solve(matrix + damping * torch.eye(50, dtype=torch.float64), b)
    assert solution.outcome == "converged"
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-10)
    true = float((b - matrix @ solution.x - damping * solution.x).norm() / b.norm())
    assert solution.residuals[-1] == pytest.approx(true, rel=0.3, abs=1e-14)
    assert len(solution.residuals) == solution.iterations + 1


def test_as_many_steps_as_there_are_eigenvalues():
    matrix, b = positive(40)
    values, vectors = torch.linalg.eigh(matrix)
    clustered = (vectors * torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64).repeat(14)[:40]) @ vectors.T
    solution = conjugate_gradients(MatrixOperator(clustered), b, tolerance=1e-10)
    assert (solution.outcome, solution.iterations) == ("converged", 3)
    assert values.min() > 0


def test_preconditioned_needs_fewer_steps_to_the_same_solution():
    matrix, b = positive(60, 10.0)
    scale = torch.logspace(0, 3, 60, dtype=torch.float64)
    matrix = scale.sqrt()[:, None] * matrix * scale.sqrt()
    operator, options = MatrixOperator(matrix), {"tolerance": 1e-10, "max_iterations": 2000}
    plain = conjugate_gradients(operator, b, **options)
    helped = conjugate_gradients(operator, b, preconditioner=lambda r: r / matrix.diagonal(), **options)
    torch.testing.assert_close(helped.x, plain.x, rtol=1e-6, atol=1e-10)
    assert helped.iterations < plain.iterations / 3
    exact = conjugate_gradients(operator, b, preconditioner=lambda r: torch.linalg.solve(matrix, r), **options)
    assert exact.iterations == 1


def test_the_error_falls_in_the_matrix_norm_at_every_step():
    matrix, b = positive()
    x = torch.linalg.solve(matrix, b)
    errors = []
    for limit in range(1, 12):
        away = conjugate_gradients(MatrixOperator(matrix), b, max_iterations=limit, tolerance=1e-14).x - x
        errors.append(float(away @ matrix @ away))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_stops_at_its_limit_and_says_so():
    matrix, b = positive()
    solution = conjugate_gradients(MatrixOperator(matrix), b, tolerance=1e-12, max_iterations=5)
    assert (solution.outcome, solution.iterations, len(solution.residuals)) == ("iteration limit", 5, 6)


def test_a_direction_that_is_not_positive_stops_it_and_is_returned():
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 0.4], dtype=torch.float64)
    solution = conjugate_gradients(MatrixOperator(matrix), b, tolerance=1e-12)
    assert solution.outcome == "non-positive direction"
    assert solution.direction @ matrix @ solution.direction <= 0
    # The iterate has gone downhill on the quadratic, and the direction goes on.
    assert solution.x.norm() > 0
    assert 0.5 * solution.x @ matrix @ solution.x - b @ solution.x < 0
    assert (b - matrix @ solution.x) @ solution.direction > 0


def test_damping_makes_an_indefinite_matrix_solvable():
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.ones(3, dtype=torch.float64)
    solution = conjugate_gradients(MatrixOperator(matrix), b, damping=1.5, tolerance=1e-12)
    torch.testing.assert_close(solution.x, 1 / torch.tensor([4.5, 3.5, 0.5], dtype=torch.float64))


def test_a_newton_step_on_a_quadratic_loss_ends_training():
    torch.manual_seed(0)
    module = nn.Linear(5, 2).double()
    batches = [(torch.randn(20, 5).double(), torch.randn(20, 2).double())]
    operator = CurvatureOperator(module, functional.mse_loss, batches, "hessian")
    step = conjugate_gradients(operator, operator.gradient(), tolerance=1e-12, max_iterations=50)
    with torch.no_grad():
        for parameter, part in zip(module.parameters(), operator.flat.split(step.x).values(), strict=True):
            parameter.sub_(part)
    assert operator.gradient().norm() < 1e-10


def test_nothing_to_solve():
    solution = conjugate_gradients(MatrixOperator(torch.eye(3)), torch.zeros(3))
    assert (solution.outcome, solution.iterations, solution.x.tolist()) == ("converged", 0, [0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "tolerance must be above 0, got -1.0"),
        ({"max_iterations": 0}, "max_iterations must be a whole number of 1 or more"),
        ({"damping": -1.0}, "damping must be 0 or more, got -1.0"),
        ({"preconditioner": lambda r: -r}, r"preconditioner must be symmetric positive definite, got r\^T M\^-1 r = -3.0"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        conjugate_gradients(MatrixOperator(torch.eye(3)), torch.ones(3), **options)


def test_what_does_not_fit_or_is_not_finite_is_refused():
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        conjugate_gradients(MatrixOperator(torch.eye(3)), torch.ones(2))
    with pytest.raises(InputError, match="NaN or infinity"):
        conjugate_gradients(MatrixOperator(torch.full((3, 3), float("nan"))), torch.ones(3))
