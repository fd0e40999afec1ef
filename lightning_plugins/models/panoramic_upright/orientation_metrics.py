"""By how many degrees estimates of up are wrong, over many images."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_plugins.models.panoramic_upright.orientation import geodesic_distance

# Those of the field's tables: Davidson et al., "360 Camera Alignment via Segmentation", ECCV 2020.
LIMITS_DEG = (1, 2, 3, 5, 12)


class UpErrors(Metric):
    """Share of images within 1, 2, 3, 5 and 12 degrees of the true up, and mean and median of the angles.

    Args:
        **options: of ``torchmetrics.Metric``, such as ``sync_on_compute``.
    """

    full_state_update = False
    errors_deg: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("errors_deg", [], dist_reduce_fx="cat")

    def update(self, estimate: Tensor, up: Tensor) -> None:
        """Add estimates and true up-vectors ``(B, 3)``, of any length but zero."""
        # In double precision: the published measure clips the cosine, and tells no angle below 0.08 degrees.
        self.errors_deg.append(torch.rad2deg(geodesic_distance(estimate.double(), up.double())))

    def compute(self) -> dict[str, Tensor]:
        """Return ``within_1_deg`` to ``within_12_deg`` in [0, 1], ``mean_deg`` and ``median_deg``."""
        errors_deg = dim_zero_cat(self.errors_deg)
        figures = {f"within_{limit}_deg": (errors_deg < limit).double().mean() for limit in LIMITS_DEG}
        return {**figures, "mean_deg": errors_deg.mean(), "median_deg": errors_deg.quantile(0.5)}
