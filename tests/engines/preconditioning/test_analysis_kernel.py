"""Oracle: explicit Jacobians by torch.func, and products of them."""

import re

import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis import (
    TangentKernelOperator,
    conjugate_gradients,
    kernel_eigenvalues,
    kernel_regression,
    tangent_kernel,
    top_eigenpairs,
)
from tests.engines.preconditioning.dense import per_example_jacobians, relative_error


def network():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(9, 2)
    ).double()
    module(torch.randn(20, 2, 5, dtype=torch.float64))  # running statistics that are not the trivial ones
    return module.eval()


def inputs(count, seed):
    return torch.randn(count, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(module, x):
    """``(N, C, P)``"""
    return torch.cat([jacobian.flatten(2) for jacobian in per_example_jacobians(module, x).values()], dim=2)


def test_direct_kernel_is_the_product_of_jacobians():
    module, x, z = network(), inputs(4, 1), inputs(3, 2)
    left, right = rows(module, x), rows(module, z)
    kernel = tangent_kernel(module, x, z)
    assert kernel.shape == (4, 3, 2, 2)
    for n in range(4):
        for m in range(3):
            assert relative_error(kernel[n, m], left[n] @ right[m].T) < 1e-12
    torch.testing.assert_close(tangent_kernel(module, x), tangent_kernel(module, x, x))


def test_class_wise_kernel_is_that_of_each_output_alone():
    module, x, z = network(), inputs(4, 1), inputs(3, 2)
    left, right = rows(module, x), rows(module, z)
    found = tangent_kernel(module, x, z, outputs="class_wise")
    assert found.shape == (2, 4, 3)
    for output in range(2):
        assert relative_error(found[output], left[:, output] @ right[:, output].T) < 1e-12


def test_implicit_kernel_equals_the_direct_one():
    module, x = network(), inputs(4, 1)
    jacobian = rows(module, x).flatten(0, 1)
    operator = TangentKernelOperator(module, x)
    assert operator.size == 8
    assert relative_error(operator.dense(), jacobian @ jacobian.T) < 1e-12
    direct = tangent_kernel(module, x).transpose(1, 2).reshape(8, 8)
    torch.testing.assert_close(operator.dense(), direct)


def test_eigenvalues_are_those_of_the_dense_kernel_ascending_and_positive():
    module, x = network(), inputs(4, 1)
    jacobian = rows(module, x).flatten(0, 1)
    expected = torch.linalg.svdvals(jacobian).square().flip(0)
    found = kernel_eigenvalues(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    top = top_eigenpairs(TangentKernelOperator(module, x), 2, tolerance=1e-10)
    torch.testing.assert_close(top.values, expected.flip(0)[:2])


def test_kernel_regression_equals_its_formula():
    module, x, z = network(), inputs(4, 1), inputs(3, 2)
    y = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    left, right = rows(module, x).flatten(0, 1), rows(module, z).flatten(0, 1)
    for ridge in (0.0, 0.7):
        missing = (y - module(x)).detach().flatten()
        solved = torch.linalg.solve(left @ left.T + ridge * torch.eye(8, dtype=torch.float64), missing)
        expected = module(z).detach() + (right @ left.T @ solved).view(3, 2)
        torch.testing.assert_close(kernel_regression(module, x, y, z, ridge=ridge), expected, rtol=1e-8, atol=1e-10)
    # Without a ridge the training examples are met exactly.
    torch.testing.assert_close(kernel_regression(module, x, y, x), y, rtol=1e-8, atol=1e-10)


def test_kernel_regression_of_a_linear_model_is_least_squares():
    torch.manual_seed(0)
    module = nn.Linear(6, 1).double()
    x, y, z = torch.randn(4, 6).double(), torch.randn(4, 1).double(), torch.randn(2, 6).double()
    # Of all weights that fit, gradient flow ends at those nearest to the start.
    design = torch.cat([x, torch.ones(4, 1)], dim=1).double()
    start = torch.cat([module.weight[0], module.bias]).detach()
    weights = start + torch.linalg.pinv(design) @ (y[:, 0] - design @ start)
    expected = torch.cat([z, torch.ones(2, 1)], dim=1).double() @ weights
    torch.testing.assert_close(kernel_regression(module, x, y, z)[:, 0], expected)


def test_a_solve_by_products_agrees_with_the_kernel():
    module, x = network(), inputs(4, 1)
    operator = TangentKernelOperator(module, x)
    b = torch.arange(1.0, 9.0, dtype=torch.float64)
    solution = conjugate_gradients(operator, b, damping=0.1, tolerance=1e-12, max_iterations=50)
    expected = torch.linalg.solve(operator.dense() + 0.1 * torch.eye(8, dtype=torch.float64), b)
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda module, x: tangent_kernel(module.train(), x), "1 is a batch norm that uses the batch's own statistics"),
        (lambda module, x: tangent_kernel(nn.Sequential(nn.Linear(5, 2), nn.Dropout()).double(), x), "draws random numbers"),
        (lambda module, x: TangentKernelOperator(module.train(), x), "1 is a batch norm"),
        (lambda module, x: tangent_kernel(module, x, outputs="trace"), "outputs must be one of full, class_wise, got 'trace'"),
        (lambda module, x: kernel_regression(module, x, torch.ones(4), x), "targets must have the outputs' shape, (4, 2)"),
        (lambda module, x: kernel_regression(module, x, torch.ones(4, 2), x, ridge=-1.0), "ridge must be 0 or more, got -1.0"),
        (
            lambda module, x: kernel_regression(module, torch.cat([x, x]), torch.ones(8, 2), x),
            "8 examples plus ridge 0.0 is singular; give a larger ridge",
        ),
        (lambda module, x: TangentKernelOperator(module, x).matvec(torch.ones(3).double()), "shape (3,)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call(network(), inputs(4, 1))
