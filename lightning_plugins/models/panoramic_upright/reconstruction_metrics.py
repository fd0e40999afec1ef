"""How near a level image comes to the true one, in decibels, for images in [0, 1].

    PSNR = -10 log10(mean of squared errors)        WS-PSNR: the mean is taken over the sphere instead of over the pixels

Paper: Sun, Lu, Yu, "Weighted-to-Spherically-Uniform Quality Evaluation for Omnidirectional Video", SPL 2017. Its weight of a row
is the cosine of its latitude; ours is the exact solid angle, which is the same number up to a factor common to all rows.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere import solid_angles

# 100 dB, an error of 1e-5. Equal images would otherwise make every mean infinite.
LEAST_SQUARE = 1e-10


def psnr_db(prediction: Tensor, truth: Tensor, by_solid_angle: bool = False) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, ``(B,)``; at most 100 dB.

    Args:
        prediction: ``(B, C, H, W)``; what lies outside of [0, 1], which no file can hold, counts as its border.
        truth: ``(B, C, H, W)`` in [0, 1].
        by_solid_angle: WS-PSNR.

    Raises:
        InputError: if the two differ in shape.
    """
    if prediction.ndim != 4 or prediction.shape != truth.shape:
        raise InputError(
            f"prediction and truth must both have shape (B, C, H, W), got {tuple(prediction.shape)} and {tuple(truth.shape)}; "
            "resize one to the other's size"
        )
    square = (prediction.double().clamp(0, 1) - truth.double()).square().mean(dim=(1, 3))
    weight = torch.ones_like(square[0])
    if by_solid_angle:
        weight = solid_angles(*truth.shape[2:], dtype=torch.float64, device=truth.device)
    return -10 * ((square * weight).sum(-1) / weight.sum()).clamp(min=LEAST_SQUARE).log10()


class PanoramaPSNR(Metric):
    """Mean over images of PSNR and WS-PSNR.

    Args:
        **options: of ``torchmetrics.Metric``, such as ``sync_on_compute``.
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, truth: Tensor) -> None:
        """Add a batch of images ``(B, C, H, W)`` in [0, 1]."""
        self.total += torch.stack([psnr_db(prediction, truth, weighted).sum() for weighted in (False, True)])
        self.images += len(truth)

    def compute(self) -> dict[str, Tensor]:
        """Return ``psnr_db`` and ``ws_psnr_db``."""
        return dict(zip(("psnr_db", "ws_psnr_db"), self.total / self.images, strict=True))
