"""Oracle: singular values by numpy, and torch's own Muon."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.methods.muon import Muon, MuonSettings, orthogonalize


def matrix(rows, columns, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=(rows, columns)))


def block(shape, **options):
    return Muon(nn.Parameter(torch.zeros(shape, dtype=torch.float64)), MuonSettings(**options))


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_singular_values_end_where_the_scalar_iteration_takes_them(shape):
    given = matrix(*shape)
    left, values, right = np.linalg.svd(given.numpy() / np.linalg.norm(given.numpy()), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    np.testing.assert_allclose(orthogonalize(given, 5).numpy(), (left * values) @ right, rtol=0, atol=1e-12)
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize(("shape", "scale"), [((12, 30), 1.0), ((30, 12), np.sqrt(30 / 12)), ((16, 16), 1.0)])
def test_the_first_step_is_the_polar_factor_within_the_known_error(shape, scale):
    given = matrix(*shape)
    left, _, right = np.linalg.svd(given.numpy(), full_matrices=False)
    direction = block(shape).direction(given).numpy()
    error = np.linalg.svd(direction / scale - left @ right, compute_uv=False).max()
    assert error < 0.35
    assert np.sum(direction * (left @ right)) / np.linalg.norm(direction) / np.linalg.norm(left @ right) > 0.97


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_against_a_loop(nesterov):
    gradients = [matrix(4, 6, seed) for seed in range(4)]
    ours = block((4, 6), momentum=0.8, nesterov=nesterov)
    momentum = np.zeros((4, 6))
    for gradient in gradients:
        momentum = 0.8 * momentum + 0.2 * gradient.numpy()
        update = 0.2 * gradient.numpy() + 0.8 * momentum if nesterov else momentum
        expected = orthogonalize(torch.tensor(update), 5)
        torch.testing.assert_close(ours.direction(gradient), expected, rtol=0, atol=1e-12)


def test_a_kernel_is_a_matrix_of_its_outputs():
    kernel = matrix(6, 18).view(6, 2, 3, 3)
    direction = block((6, 2, 3, 3)).direction(kernel)
    assert direction.shape == kernel.shape
    torch.testing.assert_close(direction.flatten(1), block((6, 18)).direction(kernel.flatten(1)))


@pytest.mark.parametrize("factor", [1e-6, 3e4])
def test_the_scale_of_gradients_does_not_matter(factor):
    one, other = block((5, 8)), block((5, 8))
    for seed in range(3):
        gradient = matrix(5, 8, seed)
        torch.testing.assert_close(one.direction(gradient), other.direction(gradient * factor), rtol=1e-10, atol=1e-10)


def test_zeros_stay_zeros():
    assert torch.equal(block((3, 4)).direction(torch.zeros(3, 4).double()), torch.zeros(3, 4).double())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
def test_agrees_with_torchs_own_up_to_its_bfloat16():
    model = nn.Linear(24, 40, bias=False)
    theirs = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(model, "muon")
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    rival = torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(40, 24, generator=generator)
        before = model.weight.detach().clone(), theirs.weight.detach().clone()
        model.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        preconditioner.precondition(ours)
        ours.step()
        rival.step()
        step, expected = model.weight.detach() - before[0], theirs.weight.detach() - before[1]
        assert float((step - expected).norm() / expected.norm()) < 0.02


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def run(model, preconditioner, steps, start=0, poison=()):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(start, start + steps):
        inputs = matrix(8, 5, step)
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), inputs[:, :3]).backward()
        if step in poison:
            model[0].weight.grad[0, 0] = torch.inf
        preconditioner.precondition(optimizer)
        if step not in poison:
            optimizer.step()


def test_a_saved_state_continues_bit_equal():
    model = regression()
    first = GradientPreconditioner(model, "muon")
    run(model, first, 3)
    resumed = copy.deepcopy(model)
    second = GradientPreconditioner(resumed, "muon")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(model, first, 3, start=3)
    run(resumed, second, 3, start=3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


def test_infinity_does_not_enter_the_momentum():
    model, clean = regression(), regression()
    preconditioner = GradientPreconditioner(model, "muon", factor_every=4, inverse_every=4, warmup_steps=0)
    run(model, preconditioner, 3, poison=(1,))
    assert preconditioner.nonfinite_batches == 1
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    untouched = GradientPreconditioner(clean, "muon")
    run(clean, untouched, 1)
    run(clean, untouched, 1, start=2)
    torch.testing.assert_close(model[0].weight, clean[0].weight, rtol=0, atol=0)


def test_vectors_keep_the_plain_gradient_and_the_table_says_why():
    table = {line.parameter: line for line in GradientPreconditioner(regression(), "muon").table}
    assert table["0.bias"].method == "plain gradient"
    assert table["0.bias"].reason == "one axis: Muon needs a matrix"
    assert table["0.weight"].method == "muon"


def test_a_momentum_of_one_is_refused():
    with pytest.raises(InputError, match=r"momentum must be in \[0, 1\), got 1"):
        MuonSettings(momentum=1.0)
