"""A small regression, trained through GradientPreconditioner; batches are a function of the step."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def regression():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()


def train(model, preconditioner, steps, start=0, poison=(), *, learning_rate):
    """Train from step ``start`` on; the steps in ``poison`` have an infinite gradient, and the optimizer leaves them out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for index in range(start, start + steps):
        inputs = torch.tensor(np.random.default_rng(index).normal(size=(8, 2, 3, 3)))
        optimizer.zero_grad()
        functional.mse_loss(model(inputs), inputs.flatten(1)[:, :2]).backward()
        if index in poison:
            model[0].weight.grad[0, 0] = torch.inf
        preconditioner.precondition(optimizer)
        if index not in poison:
            optimizer.step()
