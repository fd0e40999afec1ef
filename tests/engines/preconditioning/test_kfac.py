"""K-FAC against dense Fisher matrices where it is exact, and against the formula of its damped inverse everywhere."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins.engines.preconditioning import GradientPreconditioner
from tests.engines.preconditioning.dense import joined, per_example_gradients, per_example_jacobians, relative_error


def observed(model, loss, inputs, targets, method="kfac", **options):
    """One step of a preconditioner; returns it with the plain gradients by name."""
    preconditioner = GradientPreconditioner(model, method, **options)
    model.zero_grad()
    value = loss(model(inputs), targets)
    preconditioner.observe(value)
    value.backward()
    plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    preconditioner.precondition()
    preconditioner.detach()
    return preconditioner, plain


def factors(preconditioner, name):
    """The running factors of a layer, as ``(B, d, d)``."""
    (slot,) = [slot for slot in preconditioner._slots if slot.name == name]
    kept = slot.block.factors
    return kept.inputs.value[:, 0], None if kept.outputs.value is None else kept.outputs.value[:, 0]


def squared(output, target):
    return functional.mse_loss(output, target)


class DeepLinear(nn.Module):
    """Linear layers alone, over positions; ``pooled`` averages the positions before the last layer."""

    def __init__(self, pooled=False):
        super().__init__()
        self.first, self.second, self.pooled = nn.Linear(4, 3), nn.Linear(3, 2, bias=False), pooled

    def forward(self, x):
        x = self.first(x)
        return self.second(x.mean(1) if self.pooled else x)


def dense_exact_fisher(model, inputs, curvature, names):
    """``E_n[J^T H J]`` of the parameters ``names`` for a Hessian ``curvature`` times the identity."""
    jacobians = per_example_jacobians(model, inputs)
    parts = [jacobians[name] for name in names]
    rows = torch.stack([joined(*(part[:, output] for part in parts)) for output in range(parts[0].shape[1])], dim=1)
    return curvature * torch.einsum("nci,ncj->ij", rows, rows) / len(inputs)


@pytest.mark.parametrize(
    ("pooled", "positions", "shape"),
    [(False, "expand", (16, 4)), (False, "expand", (16, 5, 4)), (True, "reduce", (16, 5, 4)), (False, "reduce", (16, 4))],
)
def test_factors_are_exact_for_deep_linear_networks(pooled, positions, shape):
    torch.manual_seed(0)
    model = DeepLinear(pooled).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    targets = torch.randn_like(model(inputs))
    preconditioner, _ = observed(model, squared, inputs, targets, fisher="exact", positions=positions)
    curvature = 2.0 / targets[0].numel()  # of the mean over an example's entries
    for name, parameters in (("first", ("first.weight", "first.bias")), ("second", ("second.weight",))):
        a, g = factors(preconditioner, name)
        found = torch.kron(g[0], a[0])
        expected = dense_exact_fisher(model, inputs, curvature, parameters)
        assert relative_error(found, expected) < 1e-12, name


def test_factors_of_one_datum_are_exact():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    inputs, targets = torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    preconditioner, _ = observed(model, functional.cross_entropy, inputs, targets)
    gradients = per_example_gradients(model, functional.cross_entropy, inputs, targets)
    for name in ("0", "2"):
        a, g = factors(preconditioner, name)
        vector = joined(gradients[f"{name}.weight"], gradients[f"{name}.bias"])[0]
        assert relative_error(torch.kron(g[0], a[0]), torch.outer(vector, vector)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_factors_of_convolutions_equal_loops(options):
    torch.manual_seed(2)
    layer = nn.Conv2d(4, 6, 3, **options).double()
    model = nn.Sequential(layer, nn.Flatten())
    inputs = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    targets = torch.randn_like(model(inputs))
    preconditioner, _ = observed(model, squared, inputs, targets, fisher="empirical")
    groups = layer.groups
    padding = layer._reversed_padding_repeated_twice if layer.padding == "same" else [layer.padding[0]] * 4
    padded = functional.pad(inputs, padding).numpy()
    output = layer(inputs)
    per_example = torch.autograd.grad(functional.mse_loss(output.flatten(1), targets), output)[0].numpy() * len(inputs)
    a, g = factors(preconditioner, "0")
    for group in range(groups):
        expected_a, expected_g = 0.0, 0.0
        channels, outputs = 4 // groups, 6 // groups
        for n, i, j in np.ndindex(3, *output.shape[2:]):
            patch = [
                padded[
                    n,
                    group * channels + c,
                    i * layer.stride[0] + u * layer.dilation[0],
                    j * layer.stride[1] + v * layer.dilation[1],
                ]
                for c, u, v in np.ndindex(channels, 3, 3)
            ]
            row = np.array([*patch, 1.0])
            delta = per_example[n, group * outputs : (group + 1) * outputs, i, j]
            expected_a = expected_a + np.outer(row, row)
            expected_g = expected_g + np.outer(delta, delta)
        np.testing.assert_allclose(a[group], expected_a / (3 * output.shape[2] * output.shape[3]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(g[group], expected_g / 3, rtol=0, atol=1e-14)


def damped(a, g, v, damping):
    """``(G + sqrt(damping)/pi)^-1 V (A + pi sqrt(damping))^-1`` in numpy."""
    a, g, v = (value.double().numpy() for value in (a, g, v))
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    left = np.linalg.inv(g + np.sqrt(damping) / pi * np.eye(len(g)))
    return left @ v @ np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(len(a)))


@pytest.mark.parametrize("relative", [False, True])
def test_direction_is_the_damped_inverse(relative):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    inputs, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 5, (20,))
    preconditioner, plain = observed(model, functional.cross_entropy, inputs, targets, damping=0.05, relative_damping=relative)
    for name in ("0", "2"):
        a, g = (factor[0] for factor in factors(preconditioner, name))
        damping = 0.05 * float(torch.trace(a) / len(a) * torch.trace(g) / len(g)) if relative else 0.05
        v = torch.cat([plain[f"{name}.weight"], plain[f"{name}.bias"][:, None]], dim=1)
        layer = model[int(name)]
        found = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
        np.testing.assert_allclose(found.numpy(), damped(a, g, v, damping), rtol=1e-9, atol=1e-12)


def test_wide_factors_are_block_diagonal():
    torch.manual_seed(4)
    layer = nn.Linear(7, 5).double()  # 8 inputs with the bias: blocks of 3, 3, 2 and of 3, 2
    inputs, targets = torch.randn(30, 7, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    whole, plain = observed(layer, squared, inputs, targets, damping=0.1)
    a, g = (factor[0] for factor in factors(whole, ""))
    observed(layer, squared, inputs, targets, damping=0.1, max_dim=3)
    found = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
    blocks = [slice(0, 3), slice(3, 6), slice(6, 8)], [slice(0, 3), slice(3, 5)]
    blocked_a, blocked_g = torch.zeros_like(a), torch.zeros_like(g)
    for part in blocks[0]:
        blocked_a[part, part] = a[part, part]
    for part in blocks[1]:
        blocked_g[part, part] = g[part, part]
    v = torch.cat([plain["weight"], plain["bias"][:, None]], dim=1)
    np.testing.assert_allclose(found.numpy(), damped(blocked_a, blocked_g, v, 0.1), rtol=1e-9, atol=1e-12)


def test_embeddings_are_divided_by_their_tokens_frequency():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 4)).double()
    tokens, targets = torch.randint(0, 5, (8, 4)), torch.randint(0, 4, (8,))
    preconditioner, plain = observed(model, functional.cross_entropy, tokens, targets, damping=0.02)
    frequency = torch.bincount(tokens.flatten(), minlength=6).double() / tokens.numel()
    (slot,) = [slot for slot in preconditioner._slots if slot.name == "0"]
    g = slot.block.factors.outputs.value[0, 0]
    expected = damped(torch.diag(frequency), g, plain["0.weight"].T, 0.02).T
    np.testing.assert_allclose(model[0].weight.grad.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(model[0].weight.grad[5], torch.zeros(3, dtype=torch.float64)), "token 5 was never seen"


class Twice(nn.Module):
    """One layer called twice: its calls are positions of the same examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """Two modules of one weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight, self.other.bias = self.layer.weight, self.layer.bias

    def forward(self, x):
        return self.other(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("shared", [Twice, Tied])
def test_calls_of_shared_weights_are_positions(shared):
    torch.manual_seed(6)
    model = shared().double()
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 4, (9,))
    preconditioner, _ = observed(model, functional.cross_entropy, inputs, targets)
    weight, bias = model.layer.weight.detach(), model.layer.bias.detach()
    middle = torch.tanh(inputs @ weight.T + bias)
    delta_out = torch.softmax(middle @ weight.T + bias, -1) - functional.one_hot(targets, 4)
    delta_in = (delta_out @ weight) * (1 - middle**2)
    ones = torch.ones(9, 1, dtype=torch.float64)
    rows = torch.cat([torch.cat([inputs, ones], 1), torch.cat([middle, ones], 1)])
    deltas = torch.cat([delta_in, delta_out])
    a, g = factors(preconditioner, "layer")
    torch.testing.assert_close(a[0], rows.T @ rows / 18)
    torch.testing.assert_close(g[0], deltas.T @ deltas / 9)


def direction(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def classifier(dtype=torch.float64):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)).to(dtype)
    return model, torch.randn(12, 1, 6, 6, dtype=dtype), torch.randint(0, 5, (12,))


def test_duplicating_the_batch_changes_nothing():
    model, inputs, targets = classifier()
    observed(model, functional.cross_entropy, inputs, targets)
    once = direction(model)
    observed(model, functional.cross_entropy, inputs.repeat(2, 1, 1, 1), targets.repeat(2))
    torch.testing.assert_close(direction(model), once, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("fisher", "change"),
    [("empirical", "sum"), ("empirical", "scale"), ("empirical", "unknown"), ("exact", "sum"), ("exact", "scale")],
)
def test_the_scale_of_the_loss_changes_the_gradient_alone(fisher, change):
    model, inputs, targets = classifier()
    changed = {
        "sum": lambda o, t: functional.cross_entropy(o, t, reduction="sum"),
        "scale": lambda o, t: functional.cross_entropy(o, t) * torch.tensor(2.0**16) / 4,
        "unknown": lambda o, t: -o.log_softmax(1)[torch.arange(len(t)), t].mean() * 8,
    }[change]
    factor = {"sum": 12.0, "scale": 2.0**14, "unknown": 8.0}[change]
    observed(model, functional.cross_entropy, inputs, targets, fisher=fisher)
    plain = direction(model)
    observed(model, changed, inputs, targets, fisher=fisher)
    torch.testing.assert_close(direction(model), plain * factor, rtol=1e-9, atol=0)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_micro_batches_of_any_size_equal_their_union(fisher):
    model, inputs, targets = classifier()
    observed(model, functional.cross_entropy, inputs, targets, fisher=fisher)
    once = direction(model)
    preconditioner = GradientPreconditioner(model, "kfac", fisher=fisher)
    model.zero_grad()
    for part in (slice(0, 3), slice(3, 12)):
        loss = functional.cross_entropy(model(inputs[part]), targets[part]) * (part.stop - part.start) / 12
        preconditioner.observe(loss)
        loss.backward()
    # Each micro-batch's weight in the mean gradient is its share: in the graph it looks like a gradient scaler and is taken out.
    preconditioner.precondition()
    preconditioner.detach()
    torch.testing.assert_close(direction(model), once, rtol=1e-9, atol=0)


def test_monte_carlo_tends_to_the_exact_fisher():
    model, inputs, targets = classifier()
    exact, _ = observed(model, functional.cross_entropy, inputs, targets, fisher="exact")
    sampled, _ = observed(model, functional.cross_entropy, inputs, targets, fisher="mc", samples=3000)
    for name in ("0", "3"):
        (a, g), (sampled_a, sampled_g) = factors(exact, name), factors(sampled, name)
        assert torch.equal(a, sampled_a)
        assert relative_error(sampled_g, g) < 0.03


def test_an_invertible_map_of_a_layers_input_changes_nothing():
    """K-FAC without damping does not see how its inputs are expressed."""
    torch.manual_seed(8)
    model = nn.Linear(4, 3, bias=False).double()
    mapping = torch.randn(4, 4, dtype=torch.float64)
    inputs, targets = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    observed(model, functional.cross_entropy, inputs, targets, damping=1e-16, fisher="empirical")
    step = model.weight.grad.clone()
    mapped = nn.Linear(4, 3, bias=False).double()
    mapped.weight.data = model.weight.data @ mapping.inverse()  # sees inputs @ mapping.T and computes the same
    observed(mapped, functional.cross_entropy, inputs @ mapping.T, targets, damping=1e-16, fisher="empirical")
    torch.testing.assert_close(mapped.weight.grad @ mapping, step, rtol=1e-5, atol=1e-8)


def test_large_damping_tends_to_the_gradient():
    model, inputs, targets = classifier()
    _, plain = observed(model, functional.cross_entropy, inputs, targets, damping=1e12)
    flat = torch.cat([value.flatten() for value in plain.values()])
    assert relative_error(direction(model) * 1e12, flat) < 1e-5


def test_directions_descend():
    model, inputs, targets = classifier()
    _, plain = observed(model, functional.cross_entropy, inputs, targets)
    for name, parameter in model.named_parameters():
        assert (parameter.grad * plain[name]).sum() > 0


def test_foof_sees_inputs_alone():
    torch.manual_seed(9)
    model = nn.Linear(4, 3).double()
    inputs, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(0, 3, (20,))
    _, plain = observed(model, functional.cross_entropy, inputs, targets, method="foof", damping=0.5)
    rows = torch.cat([inputs, torch.ones(20, 1, dtype=torch.float64)], 1)
    v = torch.cat([plain["weight"], plain["bias"][:, None]], 1)
    expected = v @ torch.linalg.inv(rows.T @ rows / 20 + 0.5 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), expected)
