"""Oracle: the diagonal of the dense Fisher matrix, from per-example gradients of torch.func in float64."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins.engines.preconditioning import GradientPreconditioner
from lightning_plugins.engines.preconditioning.examples import Rows, sum_of_squares
from tests.engines.preconditioning.example_oracles import MODELS, Dense, close, flat, names_of, preconditioned

DAMPING = 0.01
N = 6


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def solve(dense, damping, *names):
    return dense.mean_gradient(*names) / (dense.rows(*names).square().sum(0) / dense.count + damping)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("case", MODELS)
def test_equals_the_diagonal_of_the_dense_matrix(case, fisher):
    model, x, y = MODELS[case](N)
    dense = Dense(model, x, y, exact=fisher == "exact")
    found = preconditioned(model, [(x, y)], "diag", fisher=fisher, damping=DAMPING)
    for names in names_of(model).values():
        close(flat(found, *names), solve(dense, DAMPING, *names))


def test_the_shortcut_for_one_position_is_the_general_way():
    inputs, gradients = torch.randn(2, N, 1, 4, dtype=torch.float64), torch.randn(2, N, 1, 3, dtype=torch.float64)
    halved = Rows(0, torch.cat([inputs, inputs], dim=2) / 2, torch.cat([gradients, gradients], dim=2))
    close(sum_of_squares(Rows(0, inputs, gradients)), sum_of_squares(halved))


def test_tokens_are_added_up_within_an_example_before_they_are_squared():
    tokens = torch.tensor([[[[3], [1], [3]], [[1], [1], [0]]]])
    gradients = torch.tensor([[[1.0], [2.0], [4.0]], [[1.0], [-1.0], [5.0]]]).unsqueeze(0)
    assert sum_of_squares(Rows(0, tokens, gradients), 5).tolist() == [[[25.0, 4.0, 0.0, 25.0, 0.0]]]


def test_a_large_vocabulary_takes_memory_for_its_weight_alone(monkeypatch):
    largest = []
    made = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, *shape: largest.append(shape) or made(self, *shape))
    model = nn.Sequential(nn.Embedding(5000, 2), nn.Flatten(), nn.Linear(8, 3))
    preconditioned(model, [(torch.randint(5000, (64, 4)), torch.randint(3, (64,)))], "diag")
    assert largest
    assert max(math.prod(shape) for shape in largest) == 10000


def test_the_average_over_steps_has_its_decay():
    model, x, y = MODELS["perceptron"](N)
    other = torch.randn_like(x)
    tapped = copy.deepcopy(model)
    preconditioner = GradientPreconditioner(tapped, "diag", damping=DAMPING, decay=0.25)
    for inputs in (x, other):
        tapped.zero_grad()
        loss = functional.cross_entropy(tapped(inputs), y)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition()
    first, second = (Dense(model, inputs, y) for inputs in (x, other))
    squares = [dense.rows("0.weight").square().sum(0) / N for dense in (first, second)]
    expected = second.mean_gradient("0.weight") / (0.25 * squares[0] + 0.75 * squares[1] + DAMPING)
    close(tapped[0].weight.grad.flatten(), expected)
