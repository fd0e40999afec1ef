"""Segmentation Feature Fusion: what the sphere saw and what the equirectangular image saw, into one feature map.

Paper: Liu et al., arXiv 2405.16858. Its abstract names the fusion and does not define it, so three readings stand here under one
signature, ``fuse(grid (B, C, h, w), sphere (B, S, h, w)) -> (B, C, h, w)``, both on the same equirectangular grid:

- ``band_gated`` (default): latitude bands are the segments. Each row has a gate per channel,
      out = g * sphere' + (1 - g) * grid,   g = sigmoid(bias[band] + linear(row means of both)),
  so that the sphere can be trusted near the poles and the grid near the equator. Row means make it blind to yaw.
- ``squeeze_excite``: a residual from the concatenation, scaled per channel from global means (as UniFuse does).
- ``concat``: a 1 x 1 convolution of the concatenation; the control.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._support.errors import InputError, nearest


class BandGatedFusion(nn.Module):
    """Blend by a gate per latitude band and channel; ``last_gate`` ``(B, C, h, 1)`` is the newest one, detached.

    Args:
        channels: C, channels of the grid's features and of the result.
        sphere_channels: S, channels of the sphere's features.
        bands: knots of the learned bias between zenith and nadir; rows in between are interpolated, so any height fits.
    """

    last_gate: Tensor | None = None

    def __init__(self, channels: int, sphere_channels: int, bands: int = 6) -> None:
        super().__init__()
        self.project = nn.Conv2d(sphere_channels, channels, 1)
        self.pooled = nn.Conv2d(2 * channels, channels, 1)
        self.band_bias = nn.Parameter(torch.zeros(1, channels, bands, 1))

    def forward(self, grid: Tensor, sphere: Tensor) -> Tensor:
        sphere = self.project(sphere)
        rows = torch.cat([grid.mean(dim=3, keepdim=True), sphere.mean(dim=3, keepdim=True)], dim=1)
        bias = F.interpolate(self.band_bias, size=(grid.shape[2], 1), mode="bilinear", align_corners=False)
        gate = torch.sigmoid(self.pooled(rows) + bias)
        self.last_gate = gate.detach()
        return gate * sphere + (1 - gate) * grid


class SqueezeExciteFusion(nn.Module):
    """Add a residual of both maps, scaled per channel by a squeeze-and-excitation of their global means."""

    def __init__(self, channels: int, sphere_channels: int) -> None:
        super().__init__()
        both = channels + sphere_channels
        self.excite = nn.Sequential(
            nn.Conv2d(both, max(4, both // 8), 1), nn.ReLU(inplace=True), nn.Conv2d(max(4, both // 8), both, 1), nn.Sigmoid()
        )
        self.mix = nn.Conv2d(both, channels, 1)

    def forward(self, grid: Tensor, sphere: Tensor) -> Tensor:
        both = torch.cat([grid, sphere], dim=1)
        return grid + self.mix(both * self.excite(both.mean(dim=(2, 3), keepdim=True)))


class ConcatFusion(nn.Module):
    """One 1 x 1 convolution of the concatenation."""

    def __init__(self, channels: int, sphere_channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels + sphere_channels, channels, 1)

    def forward(self, grid: Tensor, sphere: Tensor) -> Tensor:
        return self.mix(torch.cat([grid, sphere], dim=1))


FUSIONS: dict[str, type[nn.Module]] = {
    "band_gated": BandGatedFusion,
    "squeeze_excite": SqueezeExciteFusion,
    "concat": ConcatFusion,
}


def build_fusion(name: str, channels: int, sphere_channels: int) -> nn.Module:
    """Return a new fusion of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in FUSIONS:
        raise InputError(f"fusion must name a way to fuse the two branches, got {name!r}; {nearest(name, FUSIONS)}")
    return FUSIONS[name](channels, sphere_channels)


def saturated_share(network: nn.Module, limit: float = 0.02) -> float | None:
    """Return the share of gate values of a network's newest forward pass within ``limit`` of 0 or 1; None without gates."""
    gates = [m.last_gate.flatten() for m in network.modules() if isinstance(m, BandGatedFusion) and m.last_gate is not None]
    if not gates:
        return None
    every = torch.cat(gates)
    return float(((every < limit) | (every > 1 - limit)).float().mean())
