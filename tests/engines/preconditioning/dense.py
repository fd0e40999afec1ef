"""Dense oracles: per-example gradients and Jacobians by torch.func, with nothing of the engine in them."""

import torch
from torch.func import functional_call, jacrev, vmap


def per_example_gradients(model, loss, inputs, targets):
    """The gradient of each example's own loss, by parameter name: ``(N, *shape)``.

    ``loss(output, target)`` is given a batch of one and returns the loss of that example.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(given, x, y):
        return loss(functional_call(model, (given, buffers), (x.unsqueeze(0),)), y.unsqueeze(0))

    return vmap(torch.func.grad(single), in_dims=(None, 0, 0))(parameters, inputs, targets)


def per_example_jacobians(model, inputs):
    """d output / d parameter for each example, by name: ``(N, outputs, *shape)``; outputs are flattened."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(given, x):
        return functional_call(model, (given, buffers), (x.unsqueeze(0),)).flatten()

    return vmap(jacrev(single), in_dims=(None, 0))(parameters, inputs)


def joined(weight, bias=None):
    """Weight ``(K, O, ...)`` and bias ``(K, O)`` as vectors ``(K, O * (I + 1))``, the bias the last column of the matrix."""
    matrix = weight.flatten(2)
    if bias is not None:
        matrix = torch.cat([matrix, bias.unsqueeze(-1)], dim=-1)
    return matrix.flatten(1)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
