"""What models do besides: parametrized, empty, sparse, frozen and half-precision layers, keyword calls, shared optimizers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import METHODS, GradientPreconditioner

TAPPED = sorted(name for name, entry in METHODS.items() if not entry.gradient_only)
METHODS_OF_TENSORS = sorted(name for name, entry in METHODS.items() if entry.gradient_only)


def table(model, method="kfac", **options):
    return {line.parameter: line for line in GradientPreconditioner(model, method, **options).table}


def one_step(model, loss, method="kfac", optimizer=None, **options):
    preconditioner = GradientPreconditioner(model, method, **options)
    value = loss()
    preconditioner.observe(value)
    value.backward()
    preconditioner.precondition(optimizer)
    preconditioner.detach()
    return preconditioner


@pytest.mark.parametrize("method", sorted(METHODS))
def test_state_keeps_its_precision_within_autocast(method):
    """Lightning runs the backward pass of manual optimization within autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        preconditioner = one_step(model, lambda: functional.cross_entropy(model(inputs), targets), method)
        preconditioner.replay(lambda: functional.cross_entropy(model(inputs), targets))

    def dtypes(state):
        if isinstance(state, torch.Tensor):
            return {state.dtype}
        parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
        return set().union(*(dtypes(part) for part in parts)) if parts else set()

    assert torch.bfloat16 not in dtypes(preconditioner.state_dict())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_computed_weights_keep_their_gradient(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 3))
    lines = table(model)
    assert lines["1.weight"].method == "kfac"
    assert {line.method for name, line in lines.items() if name.startswith("0.")} == {"plain gradient"}


@pytest.mark.parametrize("method", TAPPED)
def test_a_layer_without_rows_is_passed_over(method):
    """As an expert is to which no token was sent."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "expert": nn.Linear(4, 3)})
    inputs, targets = torch.randn(6, 4), torch.randint(0, 3, (6,))

    def loss():
        return functional.cross_entropy(torch.cat([model["used"](inputs), model["expert"](inputs[:0])]), targets)

    one_step(model, loss, method)
    assert not model["expert"].weight.grad.any()
    assert model["used"].weight.grad.isfinite().all()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_extra_passes_leave_out_what_was_frozen_since(fisher):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    preconditioner = GradientPreconditioner(model, "kfac", fisher=fisher)
    model[2].requires_grad_(False)
    loss = functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
    preconditioner.observe(loss)
    loss.backward()
    before = model[0].weight.grad.clone()
    preconditioner.precondition()
    assert not torch.equal(model[0].weight.grad, before)


@pytest.mark.parametrize("method", ["kfac", "diag", *METHODS_OF_TENSORS])
def test_sparse_gradients_stay_as_they_are(method):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    preconditioner = one_step(
        model, lambda: functional.cross_entropy(model(torch.randint(0, 9, (6, 2))), torch.randint(0, 3, (6,))), method
    )
    assert model[0].weight.grad.is_sparse
    assert preconditioner.table[0].reason == "its gradients are sparse"


def test_a_call_by_keyword_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(input=x)

    model = Named()
    inputs, targets = torch.randn(6, 4), torch.randint(0, 3, (6,))
    preconditioner = one_step(model, lambda: functional.cross_entropy(model(inputs), targets))
    assert preconditioner.silent() == []
    assert preconditioner.metrics()["unseen_layers_count"] == 0


def test_a_layer_between_two_optimizers_is_refused():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with pytest.raises(InputError, match="the optimizer holds 1 of its 2 parameters; give all of them to one optimizer"):
        one_step(
            model, lambda: functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))), optimizer=optimizer
        )


def test_the_table_says_which_parameter_is_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    assert table(model)["0.weight"].reason == "0.bias is frozen, and the layer is taken as a whole"


def test_names_of_parameters_can_be_ignored():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    lines = table(model, ignore=["1.weight"])
    assert lines["1.weight"].reason == "ignored by name"
    assert lines["0.weight"].method == "kfac"


def test_a_module_without_shapes_is_refused():
    with pytest.raises(InputError, match="run one batch through the module first, then attach"):
        GradientPreconditioner(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), "kfac")
