"""Dense Fisher matrices over whole parameters, in float64, and one observed step to hold against them."""

import copy

import torch
from torch.func import functional_call, hessian, vmap
from torch.nn import functional

from lightning_plugins.engines.preconditioning import GradientPreconditioner
from tests.engines.preconditioning.dense import per_example_gradients, per_example_jacobians, relative_error

cross_entropy = functional.cross_entropy


class Dense:
    """``F = rows^T rows / N`` for the loss ``(1/N) sum_n loss(module(x_n), y_n)``.

    Args:
        module: in float64; every example is seen by itself, so batch norms must be in eval mode.
        exact: rows are those of ``J^T H J`` (type 2); else per-example gradients (empirical).
    """

    def __init__(self, module, inputs, targets, loss=cross_entropy, *, exact=False):
        self.count = len(inputs)
        self.gradients = per_example_gradients(module, loss, inputs, targets)
        self.row = dict(self.gradients)
        if exact:
            state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            outputs = vmap(lambda x: functional_call(module, state, (x.unsqueeze(0),)).squeeze(0))(inputs).detach()
            heads = vmap(hessian(lambda o, y: loss(o.unsqueeze(0), y.unsqueeze(0))))(outputs, targets)
            entries = outputs[0].numel()
            values, vectors = torch.linalg.eigh(heads.reshape(self.count, entries, entries))
            roots = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # H = roots roots^T
            self.row = {
                name: torch.einsum("nce,nc...->ne...", roots, jacobian).flatten(0, 1)
                for name, jacobian in per_example_jacobians(module, inputs).items()
            }

    def rows(self, *names):
        """Return ``(M, D)``, the named parameters flattened one after the other."""
        return torch.cat([self.row[name].flatten(1) for name in names], dim=1)

    def mean_gradient(self, *names):
        return torch.cat([self.gradients[name].flatten(1) for name in names], dim=1).mean(0)

    def solve(self, damping, *names):
        """Return ``(F + damping I)^-1`` of the mean gradient, over the named parameters jointly."""
        rows = self.rows(*names)
        fisher = rows.mT @ rows / self.count
        return torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype), self.mean_gradient(*names))


def preconditioned(module, batches, method, loss=cross_entropy, scale=1.0, **options):
    """Observe the batches as micro-batches of one step; return the unscaled new gradients by name. The module is left alone."""
    module = copy.deepcopy(module)
    preconditioner = GradientPreconditioner(module, method, **options)
    total = sum(len(inputs) for inputs, _ in batches)
    for inputs, targets in batches:
        value = loss(module(inputs), targets) * (scale * len(inputs) / total)
        preconditioner.observe(value)
        value.backward()
    preconditioner.precondition(gradient_scale=scale)
    return {name: parameter.grad / scale for name, parameter in module.named_parameters()}


def flat(gradients, *names):
    return torch.cat([gradients[name].flatten() for name in names])


def close(found, expected, bound=1e-10):
    assert relative_error(found, expected) <= bound
