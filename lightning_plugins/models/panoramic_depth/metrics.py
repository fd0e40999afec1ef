"""Depth metrics under the field's named protocols: figures are comparable only within one preset.

Per image over its valid pixels, then the mean over images:

    abs_rel = mean |p - g| / g      mae = mean |p - g|      rmse = sqrt(mean (p - g)^2)
    rmse_log = sqrt(mean (log p - log g)^2)                 delta_i = share of max(p/g, g/p) < 1.25^i

Presets, as their reference codes compute them:

- ``unifuse``  0 < g <= 10 m; p and g at least 0.1 m; log10. Where the *prediction* exceeds 10 m the reference code sets the
  *truth* to 10 m and leaves the prediction: kept here, since published numbers contain it.
- ``bifuse``  0.01 < g < 10 m, median alignment, log10.
- ``omnifusion_ln``  as ``unifuse`` without the slip, natural logarithm.
- ``aligned``  as ``omnifusion_ln`` with log10 and median alignment.
- ``spherical``  as ``aligned`` without alignment, each pixel weighted by its solid angle.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.sphere import solid_angles

NAMES = ("abs_rel", "mae", "rmse", "rmse_log", "delta1", "delta2", "delta3")


@dataclass(frozen=True)
class Preset:
    """One protocol.

    Attributes:
        above_m: a true depth counts if it is greater than this.
        up_to_m: and at most this (less than this with ``open_end``).
        floor_m: both depths are raised to this before they are compared.
        align: scale the prediction to the truth's median first.
        natural_log: ln instead of log10.
        clamp_slip: UniFuse's slip, described above.
        by_solid_angle: weight pixels by their share of the sphere.
        open_end: exclude ``up_to_m`` itself.
    """

    above_m: float = 0.0
    up_to_m: float = 10.0
    floor_m: float = 0.1
    align: bool = False
    natural_log: bool = False
    clamp_slip: bool = False
    by_solid_angle: bool = False
    open_end: bool = False


PRESETS = {
    "unifuse": Preset(clamp_slip=True),
    "bifuse": Preset(above_m=0.01, align=True, floor_m=0.01, open_end=True),
    "omnifusion_ln": Preset(natural_log=True),
    "aligned": Preset(align=True),
    "spherical": Preset(by_solid_angle=True),
}


def preset_named(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in PRESETS:
        raise InputError(f"preset must name an evaluation protocol, got {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def image_metrics(prediction_m: Tensor, depth_m: Tensor, mask: Tensor, preset: Preset) -> Tensor | None:
    """Return the seven metrics of one image, ``(7,)`` in the order of ``NAMES``; None if it has no valid pixel.

    Args:
        prediction_m: ``(H, W)`` metres.
        depth_m: ``(H, W)`` metres; NaN and infinity count as invalid.
        mask: ``(H, W)``, True where the truth is valid.
    """
    upper = depth_m < preset.up_to_m if preset.open_end else depth_m <= preset.up_to_m
    valid = mask & torch.isfinite(depth_m) & (depth_m > preset.above_m) & upper
    truth, guess = depth_m[valid].double(), prediction_m[valid].double()
    if not truth.numel():
        return None
    if preset.align:
        guess = guess * (truth.median() / guess.median())
    if preset.clamp_slip:
        truth = torch.where(guess > preset.up_to_m, preset.up_to_m, truth)
    truth, guess = truth.clamp(min=preset.floor_m), guess.clamp(min=preset.floor_m)

    weight = torch.ones_like(truth)
    if preset.by_solid_angle:
        weight = solid_angles(*depth_m.shape, device=depth_m.device).double()[:, None].expand(depth_m.shape)[valid]
    weight = weight / weight.sum()

    error = (guess - truth).abs()
    log_ratio = (guess / truth).log() if preset.natural_log else (guess / truth).log10()
    ratio = torch.maximum(guess / truth, truth / guess)
    figures = [(weight * error / truth).sum(), (weight * error).sum(), (weight * error.square()).sum().sqrt()]
    figures.append((weight * log_ratio.square()).sum().sqrt())
    figures += [(weight * (ratio < 1.25**power)).sum() for power in (1, 2, 3)]
    return torch.stack(figures)


class DepthMetrics(Metric):
    """Mean over images of the seven depth metrics under one preset.

    Args:
        preset: a key of ``PRESETS``.
        **options: of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        InputError: for an unknown preset.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, preset: str = "unifuse", **options: Any) -> None:
        super().__init__(**options)
        self.preset = preset_named(preset)
        self.add_state("total", torch.zeros(len(NAMES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction_m: Tensor, depth_m: Tensor, mask: Tensor) -> None:
        """Add a batch of depths and masks ``(B, 1, H, W)``; images without a valid pixel do not count."""
        for guess, truth, valid in zip(prediction_m[:, 0], depth_m[:, 0], mask[:, 0], strict=True):
            # A prediction of NaN counts and spoils the mean, as it should; an image without truth has nothing to count.
            if (figures := image_metrics(guess, truth, valid, self.preset)) is not None:
                self.total += figures
                self.images += 1

    def compute(self) -> dict[str, Tensor]:
        """Return ``{name: mean over images}``."""
        return dict(zip(NAMES, self.total / self.images, strict=True))
