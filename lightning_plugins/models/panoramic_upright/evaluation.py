"""Scoring estimates of up side by side on the same images."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins.models.panoramic_upright.orientation import geodesic_distance
from lightning_plugins.models.panoramic_upright.orientation_metrics import LIMITS_DEG
from lightning_plugins.models.panoramic_upright.vertical_lines import estimate_up_from_lines

# From one image (3, H, W) in [0, 1] to its up-vector (3,).
Predictor = Callable[[Tensor], Tensor]
Errors = Mapping[str, NDArray[np.float64]]  # degrees, by predictor
LEVEL = (0.0, 0.0, 1.0)
# Within how many degrees of the image's vertical lines are taken for vertical, by the tilts of the images: they have no arrow.
LINES_REACH_DEG = {"small": 25.0, "sphere": 90.0}


def identity(image: Tensor) -> Tensor:
    """Return +z, as if every image were level: what doing nothing is worth."""
    return torch.tensor(LEVEL)


def up_from_lines(image: Tensor, max_tilt_deg: float) -> Tensor:
    """Return up by ``estimate_up_from_lines``, and +z where there is no cue."""
    estimate = estimate_up_from_lines(image, max_tilt_deg)
    return identity(image) if estimate is None else estimate.up


def rivals(tilt: str) -> dict[str, Predictor]:
    """Return the predictors that need no training, the lines told as much of the tilts as helps them."""
    return {"lines": partial(up_from_lines, max_tilt_deg=LINES_REACH_DEG[tilt]), "identity": identity}


@torch.no_grad()
def errors_deg(predictors: Mapping[str, Predictor], images: Iterable[tuple[Tensor, Tensor]]) -> Errors:
    """Return by how many degrees each predictor is wrong on each image.

    Args:
        predictors: by name.
        images: pairs of an image ``(3, H, W)`` in [0, 1] and its true up ``(3,)``.
    """
    errors: dict[str, list[float]] = {name: [] for name in predictors}
    for image, up in images:
        for name, predict in predictors.items():
            found = predict(image).double().cpu()
            errors[name].append(float(torch.rad2deg(geodesic_distance(found, up.double()))))
    return {name: np.array(values) for name, values in errors.items()}


def score(errors: Errors, tilt: str, limits_deg: Iterable[float] = LIMITS_DEG) -> list[dict[str, Any]]:
    """Return a row per predictor: ``predictor``, ``tilt``, % of images ``within_1_deg`` and so on, ``mean_deg``, ``images``.

    Args:
        errors: as ``errors_deg`` returns them.
        tilt: how the images were tilted, by name.
        limits_deg: the limits of the columns.
    """
    limits_deg = list(limits_deg)
    return [
        {
            "predictor": name,
            "tilt": tilt,
            **{f"within_{limit:g}_deg": round(100 * float((values < limit).mean()), 1) for limit in limits_deg},
            "mean_deg": round(float(values.mean()), 3),
            "images": len(values),
        }
        for name, values in errors.items()
    ]
