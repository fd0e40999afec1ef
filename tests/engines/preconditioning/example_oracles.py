"""Dense Fisher matrices over whole parameters, in float64, and one observed step to hold against them."""

import copy

import torch
from torch import nn
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


class Repeated(nn.Module):
    """Sequences through a linear layer that is called twice and whose weight a second module shares."""

    def __init__(self, classes=3):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))).mean(1))


class Tokens(nn.Module):
    """Sequences of tokens, some of them equal, one of them padding."""

    def __init__(self, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes)
        with torch.no_grad():
            self.norm.weight[1] = 0.0
            self.embedding.weight[0] = 0.3

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)).tanh().mean(1))


def pooled(*layers, channels):
    return nn.Sequential(*layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)).double()


def _images(count, model, *shape):
    return model, torch.randn(count, *shape, dtype=torch.float64), torch.randint(3, (count,))


# Each makes a module in float64 with three classes, inputs and targets.
MODELS = {
    "perceptron": lambda n: _images(n, nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double(), 5),
    "called twice, on sequences": lambda n: _images(n, Repeated().double(), 5, 4),
    "grouped, strided, group norm": lambda n: _images(
        n, pooled(nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1), nn.GroupNorm(2, 6), channels=6), 4, 7, 7
    ),
    "dilated, circular": lambda n: _images(
        n, pooled(nn.Conv2d(2, 3, 3, padding="same", dilation=2, padding_mode="circular"), channels=3), 2, 6, 5
    ),
    "transposed, frozen batch norm": lambda n: _images(
        n, pooled(nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(6).eval(), channels=6), 4, 3, 4
    ),
    "tokens": lambda n: (Tokens().double(), torch.randint(7, (n, 5)), torch.randint(3, (n,))),
}


def names_of(module):
    """Return the parameters of every layer, by the layer's name."""
    found = {}
    for name, _ in module.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return {layer: tuple(names) for layer, names in found.items()}


class Tagger(nn.Module):
    """A class for every position, each of which sees all others: ``(N, C, T)``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        return self.head(hidden + hidden.mean(1, keepdim=True).square()).transpose(1, 2)


def train(preconditioner, module, batches, lr=0.1):
    """Take a step of plain SGD per batch, and return all parameters as one vector."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for inputs, targets in batches:
        loss = cross_entropy(module(inputs), targets)
        preconditioner.observe(loss)
        loss.backward()
        preconditioner.precondition(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
