"""Oracle: numpy, an eigendecomposition per axis and step."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.methods.shampoo import Shampoo, ShampooSettings
from tests.engines.preconditioning.regression import regression, train


def draws(shape, count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape))


def block(shape, dtype=torch.float64, **options):
    return Shampoo(nn.Parameter(torch.zeros(shape, dtype=dtype)), ShampooSettings(**{"graft": "none", **options}))


def step(shampoo, gradient):
    gradient = torch.as_tensor(gradient)
    shampoo.fold(gradient)
    shampoo.refresh()
    return shampoo.direction(gradient)


def power(matrix, exponent, epsilon):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (np.maximum(values, 0) + epsilon * values[-1]) ** exponent) @ vectors.T


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": 0.9}, {"decay": 1.0, "root": "newton"}])
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4)])
def test_one_step_from_zero_is_the_polar_factor(shape, options):
    (gradient,) = draws(shape, 1)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    direction = step(block(shape, epsilon=1e-9, **options), gradient)
    np.testing.assert_allclose(direction.numpy(), left @ right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_dim", [5, 4])
def test_one_side_alone_still_makes_the_polar_factor(max_dim):
    (gradient,) = draws((4, 9), 1)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    direction = step(block((4, 9), epsilon=1e-12, max_dim=max_dim), gradient)
    np.testing.assert_allclose(direction.numpy(), left @ right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [None, 2])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_steps_against_a_loop(decay, order):
    shampoo = block((4, 6), decay=decay, order=order, epsilon=1e-3)
    left, right = np.zeros((4, 4)), np.zeros((6, 6))
    for k, v in enumerate(draws((4, 6), 4), start=1):
        kept = 1.0 if decay == 1.0 else min(1 - 1 / k, decay)
        taken = 1.0 if decay == 1.0 else 1 - kept
        left, right = kept * left + taken * v @ v.T, kept * right + taken * v.T @ v
        exponent = -1 / (order or 4)
        expected = power(left, exponent, 1e-3) @ v @ power(right, exponent, 1e-3)
        np.testing.assert_allclose(step(shampoo, v).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_three_axes_have_three_roots():
    shampoo = block((3, 4, 5), flatten=False, epsilon=1e-2, decay=1.0)
    sums = [np.zeros((3, 3)), np.zeros((4, 4)), np.zeros((5, 5))]
    for v in draws((3, 4, 5), 2):
        sums[0] += np.einsum("abc,zbc->az", v, v)
        sums[1] += np.einsum("abc,azc->bz", v, v)
        sums[2] += np.einsum("abc,abz->cz", v, v)
        roots = [power(total, -1 / 6, 1e-2) for total in sums]
        expected = np.einsum("abc,xa,yb,zc->xyz", v, *roots)
        np.testing.assert_allclose(step(shampoo, v).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_vector_gets_adagrad_with_a_full_matrix():
    shampoo = block((6,), decay=1.0, epsilon=1e-4)
    total = np.zeros((6, 6))
    for v in draws((6,), 3):
        total += np.outer(v, v)
        np.testing.assert_allclose(step(shampoo, v).numpy(), power(total, -0.5, 1e-4) @ v, rtol=1e-8, atol=1e-12)


def test_the_ridge_does_not_accumulate():
    shampoo = block((4, 6), epsilon=0.1)
    gradient = torch.tensor(draws((4, 6), 1)[0])
    shampoo.fold(gradient)
    statistics = copy.deepcopy(shampoo.statistics)
    shampoo.refresh()
    once = shampoo.direction(gradient)
    for _ in range(20):
        shampoo.refresh()
    assert all(torch.equal(shampoo.statistics[axis], statistics[axis]) for axis in statistics)
    assert torch.equal(shampoo.direction(gradient), once)


def graft_step(graft, gradients):
    """The last step of learning rate 1 by torch's own optimizer."""
    parameter = nn.Parameter(torch.zeros(gradients.shape[1:], dtype=torch.float64))
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=1.0, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.8, 0.9), eps=1e-8),
        "rmsprop": lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.0, 0.9), eps=1e-8),
    }[graft]([parameter])
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return before - parameter.detach()


@pytest.mark.parametrize("graft", ["sgd", "adagrad", "rmsprop", "adam"])
def test_a_graft_gives_the_length_and_nothing_else(graft):
    gradients = draws((4, 6), 3)
    plain, grafted = block((4, 6)), block((4, 6), graft=graft, graft_betas=(0.8, 0.9))
    for gradient in gradients:
        direction, same = step(grafted, gradient), step(plain, gradient)
    torch.testing.assert_close(direction.norm(), graft_step(graft, gradients).norm(), rtol=1e-9, atol=0)
    torch.testing.assert_close(direction / direction.norm(), same / same.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("graft", "power_of_scale"), [("none", 0), ("sgd", 1), ("adam", 0)])
def test_how_the_scale_of_gradients_enters(graft, power_of_scale):
    one, other = block((4, 6), graft=graft, graft_epsilon=1e-300), block((4, 6), graft=graft, graft_epsilon=1e-300)
    for gradient in draws((4, 6), 3):
        expected = step(one, gradient) * 2.0 ** (10 * power_of_scale)
        torch.testing.assert_close(step(other, gradient * 2.0**10), expected, rtol=1e-10, atol=1e-12)


def test_rotating_the_gradients_rotates_the_directions():
    left, right = (np.linalg.qr(draws((n, n), 1)[0])[0] for n in (4, 6))
    one, other = block((4, 6), epsilon=1e-4), block((4, 6), epsilon=1e-4)
    for gradient in draws((4, 6), 3, seed=1):
        expected = left @ step(one, gradient).numpy() @ right
        np.testing.assert_allclose(step(other, left @ gradient @ right).numpy(), expected, rtol=1e-9, atol=1e-10)


def test_a_dead_layer_stays_still_and_wakes_up():
    shampoo = block((4, 6))
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    assert torch.equal(step(shampoo, zeros), zeros)
    (gradient,) = draws((4, 6), 1)
    assert torch.equal(shampoo.direction(torch.tensor(gradient)), torch.tensor(gradient))


def test_half_precision_keeps_statistics_in_float32():
    shampoo = block((4, 6), dtype=torch.bfloat16)
    direction = step(shampoo, torch.tensor(draws((4, 6), 1)[0]).bfloat16())
    assert direction.dtype == torch.bfloat16
    assert shampoo.statistics[0].dtype == torch.float32


run = partial(train, learning_rate=0.05)


@pytest.mark.parametrize("graft", ["none", "sgd", "adagrad", "rmsprop", "adam"])
def test_a_saved_state_continues_bit_equal_between_two_refreshes(graft):
    options = {"inverse_every": 4, "warmup_steps": 0, "graft": graft}
    model = regression()
    first = GradientPreconditioner(model, "shampoo", **options)
    run(model, first, 6)
    resumed = copy.deepcopy(model)
    second = GradientPreconditioner(resumed, "shampoo", **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(model, first, 5, start=6)
    run(resumed, second, 5, start=6)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("every", [1, 4])
def test_infinity_enters_neither_statistics_nor_graft(every):
    model = regression()
    preconditioner = GradientPreconditioner(model, "shampoo", factor_every=every, inverse_every=every, warmup_steps=0)
    run(model, preconditioner, 3, poison=(1,))
    assert preconditioner.nonfinite_batches == 1
    for saved in preconditioner.state_dict()["blocks"]:
        state = saved["state"]
        kept = [*state["statistics"].values(), *state["roots"].values(), state["graft"]["first"], state["graft"]["second"]]
        assert all(bool(tensor.isfinite().all()) for tensor in kept)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_root_that_fails_leaves_the_old_ones(monkeypatch):
    shampoo = block((4, 6))
    (gradient,) = draws((4, 6), 1)
    before = step(shampoo, gradient)

    def fail(matrix):
        raise RuntimeError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    shampoo.refresh()
    assert torch.equal(shampoo.direction(torch.tensor(gradient)), before)
    assert shampoo.trouble.kept_inverses == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"graft": "lamb"}, "graft must be one of none, sgd, adagrad, rmsprop, adam, got 'lamb'"),
        ({"graft_betas": (0.9, 1.0)}, r"graft_betas\[1\] must be in"),
        ({"root": "svd"}, "root must be one of eigh, newton"),
        ({"order": 0}, "order must be a whole number of 1 or more"),
        ({"max_dim": -1}, "max_dim must be a whole number of 0 or more, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        ShampooSettings(**options)
