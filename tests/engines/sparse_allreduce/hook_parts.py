"""What the tests of the hook train, and the oracle: the paper's step written densely in numpy, for all ranks in one process."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lightning_plugins.engines.sparse_allreduce import OkTopkState, ok_topk_hook


def net(dtype=torch.float32):
    """A perceptron of several of DDP's buckets."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def batch(rank, step):
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(module, rank, step):
    x = batch(rank, step).to(next(module.parameters()).dtype)
    return functional.cross_entropy(module(x), x[:, :5].argmax(dim=1))


def hooked(module, options, **ddp):
    """Wrap a module, register the hook, and return both."""
    torch.set_num_threads(1)
    wrapped = DistributedDataParallel(module, bucket_cap_mb=0.005, **ddp)
    state = OkTopkState(wrapped, **options)
    wrapped.register_comm_hook(state, ok_topk_hook)
    return wrapped, state


def train(rank, world_size, options, steps=10, **ddp):
    """Train with the hook; return module and state."""
    module = net()
    wrapped, state = hooked(module, options, **ddp)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(wrapped, rank, step).backward()
        optimizer.step()
    return module, state


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).numpy()


class DenseOracle:
    """The step of the paper on all ranks' vectors: select, add in the order of the ranks, choose, keep the rest.

    Every threshold is exact. Entries of equal magnitude do not occur in what it is used for.
    """

    def __init__(self, ranks, elements, k):
        self.residuals = [np.zeros(elements, np.float32) for _ in range(ranks)]
        self.k = k

    def step(self, gradients):
        """Return the sum over ranks of what is chosen."""
        accs = [residual + gradient for residual, gradient in zip(self.residuals, gradients, strict=True)]
        total = np.zeros_like(accs[0])
        sent = []
        for acc in accs:
            mine = np.zeros(len(acc), bool)
            mine[np.argsort(-np.abs(acc), kind="stable")[: self.k]] = True
            mine &= acc != 0
            total[mine] += acc[mine]
            sent.append(mine)
        final = np.zeros(len(total), bool)
        final[np.argsort(-np.abs(total), kind="stable")[: self.k]] = True
        final &= total != 0
        self.residuals = [np.where(mine & final, np.float32(0), acc) for mine, acc in zip(sent, accs, strict=True)]
        return np.where(final, total, np.float32(0))


def train_densely(ranks, density, steps=10, nodes=None, clip_norm=None):
    """Train in one process as ``ranks`` ranks would with the oracle; ``nodes`` adds up so many ranks densely before."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    elements = sum(parameter.numel() for parameter in module.parameters())
    oracle = DenseOracle(ranks, elements, round(density * elements))
    for step in range(steps):
        gradients = []
        for rank in range(ranks):
            optimizer.zero_grad()
            loss_of(module, rank, step).backward()
            gradient = np.concatenate([parameter.grad.flatten().numpy() for parameter in module.parameters()])
            if clip_norm is not None:
                norm = np.sqrt(np.square(gradient.astype(np.float64)).sum())
                gradient = gradient * np.float32(min(1.0, clip_norm / np.sqrt(ranks) / norm))
            gradients.append(gradient)
        update = torch.from_numpy(oracle.step(gradients) / ranks)
        for parameter, part in zip(module.parameters(), update.split([p.numel() for p in module.parameters()]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
    return flat(module), oracle


def residual_of(state):
    """The residual of a rank in the order of the parameters, and not of the layout."""
    saved = state.rank_state_dict()["residual"]
    return torch.cat([saved[name] for name in state.shapes]).numpy()
