"""Oracles: dense Hessians and Jacobians by torch.func on the whole data set at once, in float64."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis import CurvatureOperator
from tests.engines.preconditioning.dense import per_example_gradients, relative_error


class Tied(nn.Module):
    """A weight used twice, a frozen bias and a batch norm in evaluation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def network(kind="plain"):
    torch.manual_seed(0)
    made = Tied() if kind == "tied" else nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return made.double().eval()


def examples(count=11):
    torch.manual_seed(1)
    return torch.randn(count, 3, dtype=torch.float64), torch.randint(0, 3, (count,)), torch.randn(count, 3, dtype=torch.float64)


def squared(output, target):
    return functional.mse_loss(output, target)


def unnamed_loss(output, target):
    """Twice differentiable, and convex in no known form."""
    return (torch.nn.functional.softplus(output - target) + 0.1 * (output * target).cosh()).sum(-1).mean()


LOSSES = {"cross_entropy": functional.cross_entropy, "squared": squared, "unnamed": unnamed_loss}


def case(loss, kind="plain", size=4):
    inputs, classes, values = examples()
    targets = classes if loss == "cross_entropy" else values
    # Batches of 4, 4 and 3: a mean of their means would not be the mean over the examples.
    return network(kind), LOSSES[loss], list(zip(inputs.split(size), targets.split(size), strict=True)), inputs, targets


def of_vector(module, inputs):
    """The outputs as a function of one vector of the trainable parameters, and where it is now."""
    trainable = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}

    def outputs(vector):
        start, given = 0, {}
        for name, parameter in trainable.items():
            given[name] = vector[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()
        return functional_call(module, given, (inputs,))

    return outputs, torch.cat([parameter.flatten() for parameter in trainable.values()])


def dense_gauss_newton(module, loss, inputs, targets):
    outputs, vector = of_vector(module, inputs)
    jacobian = jacrev(outputs)(vector)
    total = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for n in range(len(inputs)):
        curvature = hessian(lambda output, n=n: loss(output, targets[n : n + 1]))(outputs(vector)[n : n + 1]).reshape(3, 3)
        total += jacobian[n].T @ curvature @ jacobian[n]
    return total / len(inputs)


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_equals_the_dense_one(loss, kind):
    module, function, batches, inputs, targets = case(loss, kind)
    outputs, vector = of_vector(module, inputs)
    expected = hessian(lambda given: function(outputs(given), targets))(vector)
    assert relative_error(CurvatureOperator(module, function, batches, "hessian").dense(), expected) < 1e-10


@pytest.mark.parametrize("kind", ["plain", "tied"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gauss_newton_equals_jacobians_around_the_hessian_at_the_output(loss, kind):
    module, function, batches, inputs, targets = case(loss, kind)
    expected = dense_gauss_newton(module, function, inputs, targets)
    assert relative_error(CurvatureOperator(module, function, batches).dense(), expected) < 1e-10


@pytest.mark.parametrize("loss", LOSSES)
def test_empirical_fisher_is_the_mean_of_the_examples_outer_products(loss):
    module, function, batches, inputs, targets = case(loss)
    gradients = per_example_gradients(module, function, inputs, targets)
    rows = torch.cat([gradients[name].flatten(1) for name, _ in module.named_parameters()], dim=1)
    found = CurvatureOperator(module, function, batches, "empirical_fisher").dense()
    assert relative_error(found, rows.T @ rows / len(rows)) < 1e-10


def test_fisher_is_the_expectation_over_the_models_own_targets():
    module, function, batches, inputs, _ = case("cross_entropy")
    expected = 0.0
    probabilities = module(inputs).softmax(-1).detach()
    for drawn in range(3):  # every target that can be drawn, with its probability
        gradients = per_example_gradients(module, function, inputs, torch.full((len(inputs),), drawn))
        rows = torch.cat([gradients[name].flatten(1) for name, _ in module.named_parameters()], dim=1)
        expected = expected + (rows * probabilities[:, drawn, None]).T @ rows / len(rows)
    assert relative_error(CurvatureOperator(module, function, batches, "fisher").dense(), expected) < 1e-10


def test_gradient_is_that_of_the_mean_over_all_examples():
    module, function, batches, inputs, targets = case("unnamed")
    function(module(inputs), targets).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert relative_error(CurvatureOperator(module, function, batches).gradient(), expected) < 1e-12


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "fisher", "empirical_fisher"])
def test_products_are_linear_symmetric_and_positive(curvature):
    module, function, batches, _, _ = case("cross_entropy")
    operator = CurvatureOperator(module, function, batches, curvature)
    v, w = torch.randn(2, operator.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    av, aw = operator.matvec(v), operator.matvec(w)
    torch.testing.assert_close(operator.matvec(2.0 * v - 3.0 * w), 2.0 * av - 3.0 * aw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w @ av, v @ aw, rtol=1e-10, atol=1e-12)
    if curvature != "hessian":
        assert torch.linalg.eigvalsh(operator.dense()).min() > -1e-12


def test_how_the_examples_are_batched_does_not_matter():
    module, function, batches, inputs, targets = case("cross_entropy")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=5)
    for curvature in ("hessian", "gauss_newton", "empirical_fisher"):
        one = CurvatureOperator(module, function, batches, curvature).dense()
        other = CurvatureOperator(module, function, loader, curvature).dense()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_tokens_of_an_example_belong_together():
    torch.manual_seed(0)
    module = nn.Linear(3, 4).double()
    inputs, targets = torch.randn(5, 6, 3, dtype=torch.float64), torch.randint(0, 4, (5, 6))

    def loss(output, target):
        return functional.cross_entropy(output.transpose(1, 2), target)

    gradients = per_example_gradients(module, loss, inputs, targets)
    rows = torch.cat([gradients["weight"].flatten(1), gradients["bias"]], dim=1)
    operator = CurvatureOperator(module, loss, [(inputs, targets)], "empirical_fisher")
    assert relative_error(operator.dense(), rows.T @ rows / 5) < 1e-10


def test_attention_has_products():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.3, batch_first=True).double().eval()
    inputs, targets = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    operator = CurvatureOperator(layer, squared, [(inputs, targets)], "hessian")
    vector = torch.randn(operator.size, dtype=torch.float64)
    step = 1e-5
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters(), operator.flat.split(vector).values(), strict=True):
                parameter.add_(part, alpha=sign * step)
        sides.append(CurvatureOperator(moved, squared, [(inputs, targets)]).gradient())
    assert relative_error(operator.matvec(vector), (sides[0] - sides[1]) / (2 * step)) < 1e-6
    assert torch.backends.mha.get_fastpath_enabled()


def test_nothing_of_the_module_changes():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    before = copy.deepcopy(module.state_dict())
    inputs, classes, _ = examples()
    for curvature in ("hessian", "gauss_newton"):
        operator = CurvatureOperator(module, functional.cross_entropy, [(inputs, classes)], curvature)
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        operator.gradient()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.training


def test_parameters_are_read_at_each_product():
    module, function, batches, _, _ = case("cross_entropy")
    operator = CurvatureOperator(module, function, batches)
    vector = torch.ones(operator.size, dtype=torch.float64)
    operator.matvec(vector)
    with torch.no_grad():
        module[2].weight.mul_(2.0)
    torch.testing.assert_close(operator.matvec(vector), CurvatureOperator(module, function, batches).matvec(vector))


def test_dropout_is_refused_and_the_generator_put_back():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    operator = CurvatureOperator(module, squared, [(torch.ones(2, 3), torch.ones(2, 3))])
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=r"draws random numbers .* call module.eval\(\) first"):
        operator.matvec(torch.ones(operator.size))
    assert torch.equal(before, torch.get_rng_state())


def test_batch_statistics_have_no_empirical_fisher():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    operator = CurvatureOperator(module, squared, [(torch.randn(4, 3), torch.ones(4, 3))], "empirical_fisher")
    with pytest.raises(InputError, match=r"1 is a batch norm .* call module.eval\(\) first"):
        operator.matvec(torch.ones(operator.size))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


FLAT = [(torch.ones(2, 3), torch.ones(2, 3))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CurvatureOperator(nn.Linear(3, 3), squared, FLAT, "ggn"), "curvature must be one of hessian, gauss_newton"),
        (lambda: CurvatureOperator(nn.Linear(3, 3), squared, iter(FLAT)), "got a list_iterator; give a list of it"),
        (lambda: CurvatureOperator(nn.Linear(3, 3).requires_grad_(False), squared, FLAT), "Linear has no trainable parameter"),
        (lambda: CurvatureOperator(nn.Linear(3, 3).half(), squared, FLAT), "float32 or float64, got torch.float16"),
        (lambda: CurvatureOperator(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()), squared, FLAT), "share one dtype"),
        (lambda: CurvatureOperator(nn.Linear(3, 3), squared, []).gradient(), "batches hold no example"),
        (lambda: CurvatureOperator(nn.Linear(3, 3), squared, FLAT).matvec(torch.ones(11)), "shape (11,)"),
        (lambda: CurvatureOperator(nn.Linear(3, 3), squared, FLAT).matvec(torch.ones(12).double()), "dtype torch.float64"),
        (lambda: CurvatureOperator(nn.Linear(3, 3), lambda o, t: (o - t) ** 2, FLAT).gradient(), "scalar, the mean over a batch"),
        (lambda: CurvatureOperator(Pair(3, 3), squared, FLAT).gradient(), "one tensor with the examples on its first axis"),
        (lambda: CurvatureOperator(nn.Linear(100, 101), squared, FLAT).dense(), "10201 rows is refused"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(make, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make()
