"""The two small tasks on which ways to reduce gradients are compared: made here, the same bits for the same seed.

``small_cnn``: of 3 x 32 x 32 pixels, the shape of CIFAR-10, each image has stripes of one of ten directions in a spot at a random
place, in random colours, under noise; three convolutions and two linear layers tell the direction.

``character_transformer``: the language model of ``comparison_tasks.py``.

A batch is that of all processes together, of which each takes its share: with more processes a step sees the same examples.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import nn
from torch.nn import functional

from lightning_plugins.recipes.comparison_tasks import Batch, Task, character_transformer

CLASSES = 10
SIZE = 32  # pixels
BATCH = 64  # examples of all processes together, in both tasks

# What random numbers are drawn for; the evaluation set is the same for all seeds.
_TRAINING, _EVALUATION = 0, 1


def small_cnn(seed: int) -> Task:
    """Return the task of telling directions of stripes; batches are ``(64, 3, 32, 32)`` and ``(64,)``.

    Args:
        seed: of weights and batches.
    """

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _cnn()

    def batch(step: int) -> Batch:
        return _stripes(default_rng((_TRAINING, seed, step)), BATCH)

    return Task(make, batch, _stripes(default_rng(_EVALUATION), 512), functional.cross_entropy, steps=200)


TASKS: dict[str, Callable[[int], Task]] = {"small_cnn": small_cnn, "character_transformer": character_transformer}
# At the first step, of SGD with momentum 0.9; found for the dense contestant and the same for all.
LEARNING_RATES = {"small_cnn": 0.015, "character_transformer": 0.4}


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    """Return a process's part of a batch, of the same size for all; what cannot be divided among them is left out."""
    inputs, targets = batch
    count = len(inputs) // ranks
    return inputs[rank::ranks][:count], targets[rank::ranks][:count]


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, 32, 64, 128)):
        # Normalized by groups: statistics of a batch would depend on the number of processes.
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def _stripes(rng: Generator, count: int) -> Batch:
    labels = rng.integers(CLASSES, size=count)
    angles = (np.pi * (labels + rng.uniform(-0.4, 0.4, count)) / CLASSES)[:, None, None]
    rows, columns = np.mgrid[:SIZE, :SIZE]
    waves, phases = rng.uniform(0.12, 0.25, (count, 1, 1)), rng.uniform(0, 1, (count, 1, 1))
    stripes = np.sin(2 * np.pi * (waves * (columns * np.cos(angles) + rows * np.sin(angles)) + phases))
    centres = rng.uniform(0.25 * SIZE, 0.75 * SIZE, (2, count, 1, 1))
    spots = np.exp(-((rows - centres[0]) ** 2 + (columns - centres[1]) ** 2) / (2 * (0.2 * SIZE) ** 2))
    colours = rng.uniform(0.5, 1.0, (count, 3, 1, 1))
    images = colours * (stripes * spots)[:, None] + 0.3 * rng.standard_normal((count, 3, SIZE, SIZE))
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)
