"""Depth heads: from the decoder's one channel to metres. Exchangeable, since the paper leaves the range open.

- ``exponential``  depth = typical x exp(x): relative errors cost the same near and far, no upper bound.
- ``sigmoid``      depth = maximum x sigmoid(x): bounded, as UniFuse and its kin do.
"""

import math

import torch
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError, nearest


class ExponentialHead(nn.Module):
    """``typical_m * exp(x)``, with x limited to what keeps the depth between 1 cm and 1 km."""

    def __init__(self, max_depth_m: float) -> None:
        super().__init__()
        # A quarter of the range is where indoor depths lie; an untrained network starts there.
        self.log_typical = math.log(max_depth_m / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp((x + self.log_typical).clamp(math.log(0.01), math.log(1000.0)))


class SigmoidHead(nn.Module):
    """``max_depth_m * sigmoid(x)``, starting at a quarter of the range."""

    def __init__(self, max_depth_m: float) -> None:
        super().__init__()
        self.max_depth_m = max_depth_m

    def forward(self, x: Tensor) -> Tensor:
        return self.max_depth_m * torch.sigmoid(x - math.log(3.0))


HEADS: dict[str, type[nn.Module]] = {"exponential": ExponentialHead, "sigmoid": SigmoidHead}


def build_head(name: str, max_depth_m: float) -> nn.Module:
    """Return a new head.

    Raises:
        InputError: for an unknown name, or a range that is not positive.
    """
    if name not in HEADS:
        raise InputError(f"head must name a depth head, got {name!r}; {nearest(name, HEADS)}")
    if not max_depth_m > 0:
        raise InputError(f"max_depth_m must be greater than 0 metres, got {max_depth_m}; 10 suits rooms")
    return HEADS[name](max_depth_m)
