"""Oracles: torch.optim.Adam where all bases are the identity, and the paper's algorithm in numpy."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.methods.soap import SOAP, SOAPSettings
from tests.engines.preconditioning.regression import regression, train


def draws(shape, count, seed=0):
    """Gradients whose directions differ in size and drift, so that the bases matter and turn."""
    generator = np.random.default_rng(seed)
    scales = np.geomspace(1.0, 0.05, shape[-1]) if shape else 1.0
    noise = generator.normal(size=(count, *shape)) * scales
    return noise + 0.3 * generator.normal(size=shape) * np.linspace(1.0, -1.0, count).reshape(-1, *[1] * len(shape))


def block(shape, dtype=torch.float64, **options):
    return SOAP(nn.Parameter(torch.zeros(shape, dtype=dtype)), SOAPSettings(**options))


def step(soap, gradient, refresh=True):
    gradient = torch.as_tensor(gradient)
    soap.fold(gradient)
    if refresh:
        soap.refresh()
    return soap.direction(gradient)


def adam_steps(gradients, betas, eps):
    parameter = nn.Parameter(torch.zeros(gradients.shape[1:], dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=eps)
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        yield before - parameter.detach()


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 2, 2), (5,), ()])
def test_without_bases_it_is_adam(shape):
    gradients = draws(shape, 12)
    soap = block(shape, max_dim=0, betas=(0.8, 0.97), epsilon=1e-3)
    for gradient, expected in zip(gradients, adam_steps(gradients, (0.8, 0.97), 1e-3), strict=True):
        torch.testing.assert_close(step(soap, gradient), expected, rtol=1e-11, atol=1e-12)


def test_a_vector_gets_adam_whatever_the_cap():
    gradients = draws((7,), 5)
    soap = block((7,), betas=(0.9, 0.99))
    for gradient, expected in zip(gradients, adam_steps(gradients, (0.9, 0.99), 1e-8), strict=True):
        torch.testing.assert_close(step(soap, gradient), expected, rtol=1e-11, atol=1e-12)


def soap_by_numpy(gradients, every, beta1, beta2, decay, eps, sides=(True, True)):
    """Algorithm 3 of the paper, the first moment kept in the parameter's own axes and projected in every step.

    As in our module the statistics see a gradient before its step is taken.
    """
    rows, columns = gradients.shape[1:]
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    basis_l, basis_r = np.eye(rows), np.eye(columns)
    first, second = np.zeros((rows, columns)), np.zeros((rows, columns))
    for t, g in enumerate(gradients):
        left, right = decay * left + (1 - decay) * g @ g.T, decay * right + (1 - decay) * g.T @ g
        if t == 0:
            basis_l = np.linalg.eigh(left)[1][:, ::-1] if sides[0] else basis_l
            basis_r = np.linalg.eigh(right)[1][:, ::-1] if sides[1] else basis_r
        elif t % every == 0:
            if sides[0]:
                order = np.argsort(-np.diag(basis_l.T @ left @ basis_l), kind="stable")
                basis_l, second = np.linalg.qr(left @ basis_l[:, order])[0], second[order]
            if sides[1]:
                order = np.argsort(-np.diag(basis_r.T @ right @ basis_r), kind="stable")
                basis_r, second = np.linalg.qr(right @ basis_r[:, order])[0], second[:, order]
        first = beta1 * first + (1 - beta1) * g
        turned = basis_l.T @ g @ basis_r
        second = beta2 * second + (1 - beta2) * turned**2
        m = basis_l.T @ first @ basis_r / (1 - beta1 ** (t + 1))
        v = second / (1 - beta2 ** (t + 1))
        yield basis_l @ (m / (np.sqrt(v) + eps)) @ basis_r.T


@pytest.mark.parametrize(("max_dim", "sides"), [(6, (True, True)), (5, (True, False))])
@pytest.mark.parametrize("every", [1, 3])
def test_thirty_steps_against_the_papers_algorithm(every, max_dim, sides):
    gradients = draws((5, 6), 30)
    soap = block((5, 6), max_dim=max_dim, betas=(0.9, 0.95), decay=0.8, epsilon=1e-3)
    expected = soap_by_numpy(gradients, every, 0.9, 0.95, 0.8, 1e-3, sides)
    for t, (gradient, direction) in enumerate(zip(gradients, expected, strict=True)):
        ours = step(soap, gradient, refresh=t % every == 0)
        np.testing.assert_allclose(ours.numpy(), direction, rtol=1e-8, atol=1e-9)


def test_every_axis_of_a_kernel_can_have_a_basis():
    gradients = draws((3, 4, 2, 2), 6)
    whole, matrix = block((3, 4, 2, 2), flatten=False), block((3, 4, 2, 2))
    for gradient in gradients:
        one, other = step(whole, gradient), step(matrix, gradient)
    assert sorted(whole.bases) == [0, 1, 2, 3]
    assert sorted(matrix.bases) == [0, 1]
    assert one.shape == other.shape == (3, 4, 2, 2)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("shape", [(5, 5), (4, 7)])
def test_the_first_step_is_the_polar_factor(shape):
    gradient = draws(shape, 1)[0]
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    np.testing.assert_allclose(step(block(shape), gradient).numpy(), left @ right, rtol=0, atol=1e-6)


def test_rounding_is_not_taken_for_a_gradient():
    gradient = 100.0 * np.outer(np.linspace(1, 2, 300), np.linspace(-1, 1, 260))
    direction = step(block((300, 260), dtype=torch.float32), torch.tensor(gradient, dtype=torch.float32))
    expected = gradient / np.linalg.norm(gradient)
    assert np.linalg.norm(direction.numpy() - expected) < 0.5


def test_rotating_the_gradients_rotates_the_directions():
    left, right = (np.linalg.qr(np.random.default_rng(1).normal(size=(n, n)))[0] for n in (5, 5))
    one, other = block((5, 5), epsilon=1e-3), block((5, 5), epsilon=1e-3)
    for gradient in draws((5, 5), 8):
        expected = left @ step(one, gradient).numpy() @ right
        np.testing.assert_allclose(step(other, left @ gradient @ right).numpy(), expected, rtol=1e-8, atol=1e-9)


def test_the_scale_of_gradients_does_not_matter():
    one, other = block((4, 6), epsilon=1e-300), block((4, 6), epsilon=1e-300)
    for gradient in draws((4, 6), 8):
        torch.testing.assert_close(step(one, gradient), step(other, gradient * 2.0**20), rtol=1e-8, atol=1e-9)


def test_zeros_stay_zeros():
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    assert torch.equal(step(block((4, 6)), zeros), zeros)


def test_half_precision_keeps_statistics_in_float32():
    soap = block((4, 6), dtype=torch.bfloat16)
    assert step(soap, torch.tensor(draws((4, 6), 1)[0]).bfloat16()).dtype == torch.bfloat16
    assert {soap.statistics[0].dtype, soap.bases[0].dtype, soap.first.dtype, soap.second.dtype} == {torch.float32}


run = partial(train, learning_rate=0.01)


def test_a_saved_state_continues_bit_equal_between_two_refreshes():
    options = {"inverse_every": 4, "warmup_steps": 0}
    model = regression()
    first = GradientPreconditioner(model, "soap", **options)
    run(model, first, 6)
    resumed = copy.deepcopy(model)
    second = GradientPreconditioner(resumed, "soap", **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(model, first, 5, start=6)
    run(resumed, second, 5, start=6)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("every", [1, 4])
def test_infinity_enters_neither_statistics_nor_moments(every):
    model = regression()
    preconditioner = GradientPreconditioner(model, "soap", factor_every=every, inverse_every=every, warmup_steps=0)
    run(model, preconditioner, 3, poison=(1,))
    assert preconditioner.nonfinite_batches == 1
    for saved in preconditioner.state_dict()["blocks"]:
        state = saved["state"]
        kept = [*state["statistics"].values(), *state["bases"].values(), state["first"], state["second"]]
        assert all(bool(tensor.isfinite().all()) for tensor in kept)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_gradient_whose_square_overflows_is_left_out():
    model = regression().float()
    preconditioner = GradientPreconditioner(model, "soap")
    for value in (1.0, 1e25, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        preconditioner.precondition()
    assert preconditioner.nonfinite_batches == 1
    for saved in preconditioner.state_dict()["blocks"]:
        assert bool(saved["state"]["second"].isfinite().all())
    assert all(bool((parameter.grad.abs() < 10).all()) for parameter in model.parameters())


def test_where_no_basis_can_be_made_it_is_adam(monkeypatch):
    def fail(matrix):
        raise RuntimeError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    gradients = draws((4, 6), 3)
    soap = block((4, 6))
    for gradient, expected in zip(gradients, adam_steps(gradients, (0.95, 0.95), 1e-8), strict=True):
        torch.testing.assert_close(step(soap, gradient), expected, rtol=1e-11, atol=1e-12)
    assert soap.trouble.kept_inverses == 6


def test_what_has_no_real_numbers_keeps_the_plain_gradient():
    model = nn.Linear(2, 3)
    model.phases = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    model.nothing = nn.Parameter(torch.zeros(0, 4))
    reasons = {line.parameter: line.reason for line in GradientPreconditioner(model, "soap").table}
    assert reasons == {
        "weight": "",
        "bias": "",
        "phases": "of type torch.complex64: real floating-point numbers are needed",
        "nothing": "it is empty",
    }


def test_damping_is_refused_where_it_could_not_act():
    with pytest.raises(InputError, match=r"soap has no damping, got 0\.1; leave it out"):
        GradientPreconditioner(regression(), "soap", damping=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must be in"),
        ({"decay": 1.0}, "decay must be in"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"max_dim": -1}, "max_dim must be a whole number of 0 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SOAPSettings(**options)


@pytest.mark.parametrize("betas", [(0.95, 0.95), (0.9, 0.999), (0.99, 0.9), (0.0, 0.5)])
def test_turning_bases_do_not_blow_a_step_up(betas):
    """Fewer rows than inputs: new directions appear in every batch, and had no gradient before."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(30, 7).double()
    preconditioner = GradientPreconditioner(layer, "soap", betas=betas)
    largest = 0.0
    for _ in range(8):
        layer.zero_grad()
        torch.nn.functional.mse_loss(
            layer(torch.randn(8, 30, dtype=torch.float64)), torch.randn(8, 7, dtype=torch.float64)
        ).backward()
        preconditioner.precondition()
        largest = max(largest, float(layer.weight.grad.norm()) / 7**0.5)
    beta1, beta2 = betas
    terms = sum((beta1**2 / beta2) ** i for i in range(8))
    # A matrix of 7 rows whose entries in the basis are within the bound: at most ten times it and the root of a row's length.
    assert (
        largest
        < 10 * 30**0.5 * max(1.0, (1 - beta1) * (terms / (1 - beta2)) ** 0.5 / (1 - beta1**8) * (1 - beta2**8) ** 0.5) * 1.01
    )
