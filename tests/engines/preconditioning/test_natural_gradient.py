"""Oracle: the dense Fisher matrix over whole parameters and a dense solve, in float64: by layer, and over all of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning import gram as gram_module
from lightning_plugins.engines.preconditioning import preconditioner as preconditioner_module
from tests.engines.preconditioning.example_oracles import MODELS, Dense, close, flat, names_of, preconditioned

DAMPING = 0.01
N = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def blocks(model, method):
    """Names of the parameters that share a Fisher matrix."""
    return [sum(names_of(model).values(), ())] if method == "full" else list(names_of(model).values())


@pytest.mark.parametrize("method", ["layer", "full"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("case", MODELS)
def test_equals_the_dense_solve(case, fisher, method):
    model, x, y = MODELS[case](N)
    dense = Dense(model, x, y, exact=fisher == "exact")
    found = preconditioned(model, [(x, y)], method, fisher=fisher, damping=DAMPING)
    for names in blocks(model, method):
        close(flat(found, *names), dense.solve(DAMPING, *names))


@pytest.mark.parametrize("method", ["layer", "full"])
def test_what_no_example_says_is_preconditioned_too(method):
    model, x, y = MODELS["grouped, strided, group norm"](N)
    dense = Dense(model, x, y)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, method, damping=DAMPING)
    loss = functional.cross_entropy(tapped(x), y)
    preconditioner.observe(loss)
    loss.backward()
    added = {name: 0.3 * parameter.detach() for name, parameter in tapped.named_parameters()}
    for name, parameter in tapped.named_parameters():
        parameter.grad += added[name]
    preconditioner.precondition()
    for names in blocks(model, method):
        rows = dense.rows(*names)
        matrix = rows.mT @ rows / N + DAMPING * torch.eye(rows.shape[1], dtype=torch.float64)
        expected = torch.linalg.solve(matrix, dense.mean_gradient(*names) + flat(added, *names))
        close(flat({name: parameter.grad for name, parameter in tapped.named_parameters()}, *names), expected)


@pytest.mark.parametrize("method", ["layer", "full"])
def test_a_small_damping_costs_no_digits_in_single_precision(method):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    x, y = 3 * torch.randn(20, 60, dtype=torch.float64), torch.randint(3, (20,))
    dense = Dense(model, x, y)
    found = preconditioned(model.float(), [(x.float(), y)], method, damping=1e-5)
    for names in blocks(model, method):
        close(flat(found, *names).double(), dense.solve(1e-5, *names), 2e-3)


def test_joint_and_layer_wise_are_two_different_matrices():
    model, x, y = MODELS["perceptron"](N)
    joint, single = (preconditioned(model, [(x, y)], method, damping=DAMPING) for method in ("full", "layer"))
    assert (joint["0.weight"] - single["0.weight"]).norm() > 0.05 * single["0.weight"].norm()


def test_one_step_of_a_linear_model_reaches_the_least_squares_solution():
    """With squared errors the exact Fisher matrix is the Hessian, so a step of length 1 is Newton's."""
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    found = preconditioned(model, [(x, y)], "full", loss=functional.mse_loss, fisher="exact", damping=1e-9)
    design = torch.cat([x, torch.ones(9, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, y).solution.mT
    close(model.weight.detach() - found["weight"], solution[:, :3], 1e-6)
    close(model.bias.detach() - found["bias"], solution[:, 3], 1e-6)


class Folded(nn.Module):
    """Two positions of every example become examples of their own on the way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))


def test_layers_that_disagree_about_the_batch_are_refused_jointly_and_named():
    model, x, y = Folded(), torch.randn(N, 2, 4), torch.randint(3, (N,))
    with pytest.raises(InputError, match=r"layer second saw 6 examples and layer first 12; .* or use method 'layer'"):
        preconditioned(model, [(x, y)], "full")
    assert all(gradient.isfinite().all() for gradient in preconditioned(model, [(x, y)], "layer").values())


@pytest.mark.parametrize("method", ["layer", "full"])
def test_intervals_and_ranks_are_refused(method, monkeypatch):
    with pytest.raises(InputError, match="factor_every and inverse_every must be 1, got 1 and 2"):
        GradientPreconditioner(nn.Linear(2, 2), method, inverse_every=2)
    monkeypatch.setattr(preconditioner_module.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(preconditioner_module.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(preconditioner_module.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(preconditioner_module.dist, "new_group", lambda ranks: None)
    with pytest.raises(InputError, match="in a single process, got 2 ranks"):
        GradientPreconditioner(nn.Linear(2, 2), method, group=object())


def test_it_keeps_nothing_after_the_step():
    model, x, y = MODELS["perceptron"](N)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, "full")
    for _ in range(2):
        loss = functional.cross_entropy(tapped(x), y)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition()
    (slot,) = preconditioner._slots
    assert slot.block.state_dict() == {}
    assert slot.block.pending()[0].shape == (0, 0)


@pytest.mark.parametrize("case", ["called twice, on sequences", "grouped, strided, group norm"])
def test_both_ways_to_the_gram_matrix_agree(case):
    model, x, y = MODELS[case](N)
    preconditioner = GradientPreconditioner(model, "layer")
    loss = functional.cross_entropy(model(x), y)
    preconditioner.observe(loss)
    loss.backward()
    preconditioner._observer.finish_pass()
    for slot in preconditioner._slots:
        (examples,) = slot.block._examples.values()
        rows, gradients = torch.zeros(2, N, N, dtype=torch.float64)
        gram_module._add_gram_of_rows(rows, examples)
        gram_module._add_gram_of_gradients(gradients, examples, slot.layers[0].shape)
        close(rows, gradients)
