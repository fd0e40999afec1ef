"""Taps pair every input with the gradient of its output, whatever stands around the layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning import GradientPreconditioner


class Net(nn.Module):
    """Two layers, with what the name says between them."""

    def __init__(self, way="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused, self.way = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 2), way

    def inner(self, x):
        return functional.relu(self.first(x), inplace=self.way == "in-place")

    def forward(self, x):
        if self.way == "stray calls":
            with torch.no_grad():
                self.first(torch.full_like(x, 1e6))
            self.first(torch.full_like(x, 1e6))  # its output reaches no loss
            self.unused(x)
        if self.way.startswith("checkpoint"):
            return self.second(checkpoint(self.inner, x, use_reentrant="reentrant" in self.way))
        return self.second(self.inner(x))


def statistics(model, compiled=None, steps=1, **options):
    preconditioner = GradientPreconditioner(model, "kfac", warmup_steps=0, **options)
    called = torch.compile(model, backend=compiled) if compiled else model
    for step in range(steps):
        torch.manual_seed(step)
        # Checkpointing with re-entry wants an input that requires a gradient.
        inputs, targets = torch.randn(8, 4, requires_grad=True), torch.randint(0, 3, (8,))
        model.zero_grad()
        loss = functional.cross_entropy(called(inputs), targets)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition()
    preconditioner.detach()
    found = {}
    for slot in preconditioner._slots:
        if slot.folded:
            found[f"{slot.name} inputs"] = slot.block.factors.inputs.value
            found[f"{slot.name} outputs"] = slot.block.factors.outputs.value
    return found


@pytest.mark.parametrize("way", ["in-place", "stray calls", "checkpoint", "checkpoint reentrant"])
def test_the_same_statistics_in_every_way(way):
    plain, found = statistics(Net()), statistics(Net(way))
    assert found.keys() == plain.keys()
    assert len(plain) == 4, "a layer that is not used has no statistics"
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("every", [1, 3])
def test_compiled_code_gives_the_same_statistics_without_compiling_anew(every):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = statistics(Net(), steps=4, factor_every=every, inverse_every=every)
    found = statistics(Net(), steps=4, factor_every=every, inverse_every=every, compiled="aot_eager")
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)
    few = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    statistics(Net(), steps=14, factor_every=every, inverse_every=every, compiled="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= few, "more steps must not mean more graphs"


def test_a_layer_compiled_before_is_refused():
    model = Net()
    model.first.compile(backend="eager")
    with pytest.raises(InputError, match=r"first was compiled before the preconditioner was attached.*attach first"):
        GradientPreconditioner(model, "kfac")


def test_detaching_leaves_no_hook():
    model = Net()
    preconditioner = GradientPreconditioner(model, "kfac")
    assert len(model.first._forward_hooks) == 1
    preconditioner.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_are_left_as_they_were():
    model, inputs = Net(), torch.randn(3, 4)
    before = model(inputs)
    GradientPreconditioner(model, "kfac")
    assert torch.equal(model(inputs), before)


def test_frozen_layers_are_not_tapped_while_frozen():
    """As a GAN's discriminator is, while the generator learns through it."""
    model = Net()
    preconditioner = GradientPreconditioner(model, "kfac")
    model.second.requires_grad_(False)
    loss = functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
    preconditioner.observe(loss)
    loss.backward()
    rows = {slot.name: slot.block.rows for slot in preconditioner._slots}
    assert rows == {"first": 8, "second": 0, "unused": 0}
