"""Oracle: the update in numpy with explicit inverses, and the inverse curvature that the fit must find."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.methods.psgd import PSGD, PSGDSettings
from tests.engines.preconditioning.regression import regression, train


def draws(shape, count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape))


def block(shape, dtype=torch.float64, **options):
    return PSGD(nn.Parameter(torch.zeros(shape, dtype=dtype)), PSGDSettings(**options))


def step(psgd, gradient):
    gradient = torch.as_tensor(gradient)
    psgd.fold(gradient)
    psgd.refresh()
    return psgd.direction(gradient)


def norm_from_below(matrix):
    row = matrix[np.argmax(np.diag(matrix))]
    return np.linalg.norm(matrix @ row) / np.linalg.norm(row)


def updated_by_numpy(q_left, q_right, h, v, rate):
    """One update of a matrix's two triangles."""
    x = q_left @ h @ q_right.T
    y = np.linalg.inv(q_left).T @ v @ np.linalg.inv(q_right)
    return [
        q - rate * np.triu(ours - theirs) @ q / norm_from_below(ours + theirs)
        for q, ours, theirs in ((q_left, x @ x.T, y @ y.T), (q_right, x.T @ x, y.T @ y))
    ]


def probes(shape, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).numpy() for _ in range(count)]


def test_updates_against_a_loop_with_explicit_inverses():
    shape, rate, noise = (4, 6), 0.2, 1e-2
    gradients = 3.0 * draws(shape, 5)
    psgd = block(shape, rate=rate, noise=noise, max_rms=None, seed=11)
    start = np.sqrt(np.mean(gradients[0] ** 2)) ** -0.25
    left, right = start * np.eye(4), start * np.eye(6)
    for h, v in zip(gradients, probes(shape, 5, 11), strict=True):
        left, right = updated_by_numpy(left, right, h + noise * np.sqrt(np.mean(h**2)) * v, v, rate)
        expected = left.T @ left @ h @ right.T @ right
        np.testing.assert_allclose(step(psgd, h).numpy(), expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(q, q.triu()) for q in psgd.triangles)


def test_a_long_axis_has_a_diagonal():
    shape, rate = (3, 7), 0.2
    gradients = draws(shape, 4)
    psgd = block(shape, rate=rate, noise=1e-30, max_rms=None, max_dim=5, seed=3)
    start = np.mean(gradients[0] ** 2) ** -0.125
    left, right = start * np.eye(3), start * np.ones(7)
    for h, v in zip(gradients, probes(shape, 4, 3), strict=True):
        x, y = left @ h * right, np.linalg.inv(left).T @ v / right
        ours, theirs = x @ x.T, y @ y.T
        left = left - rate * np.triu(ours - theirs) @ left / norm_from_below(ours + theirs)
        ours, theirs = (x**2).sum(0), (y**2).sum(0)
        right = right - rate * (ours - theirs) * right / (ours + theirs).max()
        np.testing.assert_allclose(step(psgd, h).numpy(), left.T @ left @ h * right**2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 4)])
def test_any_number_of_axes_against_dense_kronecker_products(shape):
    """P as one dense matrix, from the block's own triangles, must be what it applies."""
    psgd = block(shape, flatten=False, max_rms=None)
    for h in draws(shape, 30):
        direction = step(psgd, h)
    dense = np.ones((1, 1))
    for q in psgd.triangles:
        dense = np.kron(dense, (q.mT @ q).numpy())
    np.testing.assert_allclose(direction.numpy().ravel(), dense @ h.ravel(), rtol=1e-10)
    assert len(psgd.triangles) == len(shape)


def test_on_a_quadratic_it_converges_to_the_inverse_curvature():
    """Of ``tr(W^T A W B) / 2`` at standard normal W: gradients ``A W B``, whose whitening matrix is ``A^-1 (x) B^-1``."""
    generator = np.random.default_rng(0)

    def curvature(width):
        basis = np.linalg.qr(generator.normal(size=(width, width)))[0]
        return (basis * np.geomspace(0.2, 5.0, width)) @ basis.T

    a, b = curvature(3), curvature(4)
    psgd = block((3, 4), rate=0.2, max_rms=None)
    for rate, count in ((0.2, 500), (0.05, 800), (0.01, 1200), (0.003, 1500)):
        psgd.settings = PSGDSettings(rate=rate, max_rms=None)
        for w in generator.normal(size=(count, 3, 4)):
            psgd.fold(torch.tensor(a @ w @ b))
    psgd.refresh()
    left, right = (product.numpy() for product in psgd.products)
    expected = np.kron(np.linalg.inv(a), np.linalg.inv(b))
    assert np.linalg.norm(np.kron(left, right) - expected) < 0.08 * np.linalg.norm(expected)


def test_balancing_changes_no_direction():
    psgd, balanced = block((4, 6)), block((4, 6))
    for gradient in draws((4, 6), 6):
        psgd.fold(torch.tensor(gradient))
        direction = step(balanced, gradient)
    psgd.triangles[0].mul_(2.0**20)
    psgd.triangles[1].mul_(2.0**-20)
    psgd.refresh()
    sizes = [float(q.abs().max()) for q in psgd.triangles]
    assert sizes[0] == pytest.approx(sizes[1])
    torch.testing.assert_close(psgd.direction(torch.tensor(gradient)), direction, rtol=1e-9, atol=1e-12)


def test_the_scale_of_gradients_does_not_matter():
    one, other = block((4, 6)), block((4, 6))
    for gradient in draws((4, 6), 6):
        torch.testing.assert_close(step(one, gradient), step(other, gradient * 2.0**24), rtol=1e-9, atol=1e-12)


def test_the_first_direction_is_about_one_whatever_the_gradients():
    (gradient,) = draws((4, 6), 1)
    for scale in (1e-8, 1.0, 1e6):
        assert 0.5 < float(step(block((4, 6)), gradient * scale).square().mean().sqrt()) < 1.2


def test_grown_gradients_are_bounded():
    psgd = block((4, 6), max_rms=1.1)
    for gradient in draws((4, 6), 10):
        step(psgd, gradient)
    grown = torch.tensor(1e5 * draws((4, 6), 1, seed=1)[0])
    direction = psgd.direction(grown)
    assert float(direction.square().mean().sqrt()) == pytest.approx(1.1)
    assert float((direction * grown).sum()) > 0


def test_zeros_leave_the_fit_alone():
    psgd = block((4, 6))
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    assert torch.equal(step(psgd, zeros), zeros)
    step(psgd, draws((4, 6), 1)[0])
    before = copy.deepcopy(psgd.triangles)
    psgd.fold(zeros)
    assert all(torch.equal(q, kept) for q, kept in zip(psgd.triangles, before, strict=True))


def test_half_precision_keeps_the_fit_in_float32():
    psgd = block((4, 6), dtype=torch.bfloat16)
    assert step(psgd, torch.tensor(draws((4, 6), 1)[0]).bfloat16()).dtype == torch.bfloat16
    assert {q.dtype for q in psgd.triangles} == {torch.float32}


run = partial(train, learning_rate=0.01)


def test_a_saved_state_continues_bit_equal_with_the_same_probes():
    options = {"factor_every": 2, "inverse_every": 4, "warmup_steps": 0}
    model = regression()
    first = GradientPreconditioner(model, "psgd", **options)
    run(model, first, 5)
    resumed = copy.deepcopy(model)
    second = GradientPreconditioner(resumed, "psgd", **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(model, first, 6, start=5)
    run(resumed, second, 6, start=5)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


def test_the_shared_seed_decides_the_probes():
    weights = []
    for seed in (0, 0, 1):
        model = regression()
        run(model, GradientPreconditioner(model, "psgd", seed=seed), 3)
        weights.append(model[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("every", [1, 4])
def test_infinity_does_not_enter_the_fit(every):
    model = regression()
    preconditioner = GradientPreconditioner(model, "psgd", factor_every=every, inverse_every=every, warmup_steps=0)
    run(model, preconditioner, 3, poison=(1,))
    assert preconditioner.nonfinite_batches == 1
    for saved in preconditioner.state_dict()["blocks"]:
        assert all(bool(q.isfinite().all()) for q in saved["state"]["triangles"] + saved["state"]["products"])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate must be in \(0, 1\), got 1.0"),
        ({"noise": 0.0}, "noise must be above 0"),
        ({"max_rms": -1.0}, "max_rms must be above 0"),
        ({"max_dim": 1.5}, "max_dim must be a whole number of 0 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PSGDSettings(**options)
