"""Oracle: the eigendecomposition of numpy, in float64."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.preconditioning.linear_algebra import Trouble
from lightning_plugins.engines.preconditioning.matrices import (
    add_moment_,
    multiply_axis,
    multiply_triangles,
    symmetric,
    working_shape,
)
from lightning_plugins.engines.preconditioning.roots import eigenbasis, inverse_root, turned_basis


def with_eigenvalues(values, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (basis * np.asarray(values)) @ basis.T


def root_by_numpy(matrix, order, epsilon):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (np.maximum(values, 0) + epsilon * values[-1]) ** (-1 / order)) @ vectors.T


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_equals_the_root_by_numpy(root, order):
    matrix = with_eigenvalues(np.geomspace(1e-5, 20.0, 23))
    trouble = Trouble()
    found = inverse_root(torch.tensor(matrix), order, 1e-4, root, trouble)
    expected = root_by_numpy(matrix, order, 1e-4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-7 * np.abs(expected).max())
    assert trouble == Trouble()


@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_the_ridge_takes_the_place_of_missing_eigenvalues(root):
    matrix = with_eigenvalues([0.0, 0.0, 0.0, 3.0, 5.0])
    found = inverse_root(torch.tensor(matrix), 2, 1e-2, root, Trouble())
    np.testing.assert_allclose(found.numpy(), root_by_numpy(matrix, 2, 1e-2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_float32_comes_within_its_own_rounding(root):
    matrix = with_eigenvalues(np.geomspace(1e-4, 1e-10, 40))
    found = inverse_root(torch.tensor(matrix, dtype=torch.float32), 4, 1e-3, root, Trouble())
    expected = root_by_numpy(matrix, 4, 1e-3)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_leaves_the_matrix_as_it_is(root):
    matrix = torch.tensor(with_eigenvalues([1.0, 2.0, 3.0]))
    before = matrix.clone()
    inverse_root(matrix, 2, 0.1, root, Trouble())
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("root", ["eigh", "newton"])
def test_nothing_known_is_the_identity_and_infinity_is_counted(root):
    trouble = Trouble()
    assert torch.equal(inverse_root(torch.zeros(3, 3), 4, 1e-6, root, trouble), torch.eye(3))
    assert trouble.kept_inverses == 0
    assert inverse_root(torch.full((3, 3), torch.inf), 4, 1e-6, root, trouble) is None
    assert trouble.kept_inverses == 1


def test_newton_leaves_an_indefinite_matrix_to_the_eigendecomposition():
    matrix = with_eigenvalues([-0.1, 0.5, 1.0, 2.0])
    found = inverse_root(torch.tensor(matrix), 2, 1e-3, "newton", Trouble())
    np.testing.assert_allclose(found.numpy(), root_by_numpy(matrix, 2, 1e-3), rtol=1e-9, atol=1e-9)


def test_turning_a_basis_converges_to_the_eigenvectors():
    matrix = torch.tensor(with_eigenvalues([8.0, 4.0, 2.0, 1.0, 0.5]))
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for _ in range(80):
        basis, _ = turned_basis(matrix, basis)
    torch.testing.assert_close(basis.mT @ matrix @ basis, torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5]).double()))


def test_turning_says_where_the_columns_went():
    matrix = torch.diag(torch.tensor([1.0, 5.0, 3.0]))
    basis, order = turned_basis(matrix, torch.eye(3))
    assert order.tolist() == [1, 2, 0]
    torch.testing.assert_close(basis.abs(), torch.eye(3)[:, order])


def test_an_eigenbasis_begins_with_the_largest_eigenvalue():
    matrix = torch.tensor(with_eigenvalues([1.0, 7.0, 2.0]))
    basis = eigenbasis(matrix, Trouble())
    torch.testing.assert_close((basis.mT @ matrix @ basis).diagonal(), torch.tensor([7.0, 2.0, 1.0]).double())
    assert eigenbasis(torch.full((2, 2), torch.nan), Trouble()) is None


@pytest.mark.parametrize("shape", [(7,), (5, 3), (300, 4), (4, 301), (2, 3, 4), (2, 3, 4, 5)])
def test_moments_and_products_along_an_axis_equal_einsum(shape):
    generator = np.random.default_rng(0)
    tensor = generator.normal(size=shape)
    for axis, width in enumerate(shape):
        letters = "abcd"[: len(shape)]
        other = letters.replace(letters[axis], "z")
        moment = torch.tensor(generator.normal(size=(width, width)))
        moment = moment + moment.mT
        expected = 0.5 * moment.numpy() + 2.0 * np.einsum(f"{letters},{other}->{letters[axis]}z", tensor, tensor)
        add_moment_(moment, torch.tensor(tensor), axis, kept=0.5, taken=2.0)
        np.testing.assert_allclose(symmetric(moment).numpy(), expected, atol=1e-10)
        matrix = generator.normal(size=(width, width))
        applied = np.einsum(f"z{letters[axis]},{letters}->{other}", matrix, tensor)
        np.testing.assert_allclose(multiply_axis(torch.tensor(tensor), axis, torch.tensor(matrix)).numpy(), applied, atol=1e-10)


@pytest.mark.parametrize("width", [7, 301])
def test_products_of_triangles(width):
    one, other = np.triu(np.random.default_rng(0).normal(size=(2, width, width)))
    found = multiply_triangles(torch.tensor(one), torch.tensor(other))
    np.testing.assert_allclose(found.numpy(), one @ other, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "flatten", "expected"),
    [
        ((), True, (1,)),
        ((5,), True, (5,)),
        ((4, 3), False, (4, 3)),
        ((8, 4, 3, 3), True, (8, 36)),
        ((8, 1, 3, 3), False, (8, 3, 3)),
        ((1, 1, 1), False, (1,)),
    ],
)
def test_working_shapes(shape, flatten, expected):
    assert working_shape(torch.Size(shape), flatten) == expected
