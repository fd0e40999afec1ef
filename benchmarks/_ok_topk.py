"""What the benchmarks of Ok-Topk share: gradients with the statistics of a network's, and real ranks to run functions in."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' ranks and hosts

from tests.ranks.client import Ranks
from tests.ranks.launch import rank_server

ROOT = Path(__file__).parents[1]
LAYERS = 24
SPREAD = 1.0  # standard deviation of the logarithm of a layer's scale, and of an entry's within its layer


class Gradients:
    """Gradients that are drawn afresh at every step, from a distribution that stays: profile times normal numbers.

    The profile, the same for all ranks and steps, is log-normal in every entry times log-normal in every layer. So magnitudes
    have heavy tails, layers differ in scale, and the supports of the ranks overlap without being alike.

    Args:
        elements: length of the vector.
        rank: whose gradients these are.
        device: where they are made.
    """

    def __init__(self, elements: int, rank: int = 0, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.profile = torch.randn(elements, generator=generator, device=device).mul_(SPREAD).exp_()
        rng = np.random.default_rng(0)
        cuts = [0, *sorted(rng.integers(1, elements, LAYERS - 1).tolist()), elements]
        for (start, end), scale in zip(pairwise(cuts), np.exp(rng.normal(0.0, SPREAD, LAYERS)).tolist(), strict=True):
            self.profile[start:end] *= scale
        self._generator = torch.Generator(device).manual_seed(1 + rank)
        self._device = device

    def next(self) -> Tensor:
        """Return the gradient of the next step."""
        return torch.randn(len(self.profile), generator=self._generator, device=self._device).mul_(self.profile)


@contextmanager
def real_ranks() -> Iterator[Ranks]:
    """Yield a client that runs functions in processes of their own, one thread of torch in each."""
    with rank_server(ROOT) as ranks:
        yield ranks
