"""Scoring depth predictors side by side on the same images, under one protocol."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.models.panoramic_depth.metrics import DepthMetrics

# From a batch of images (B, 3, H, W) in [0, 1] to depths (B, 1, H, W) in metres.
Predictor = Callable[[Tensor], Tensor]


@torch.no_grad()
def score(predictors: Mapping[str, Predictor], batches: Iterable[dict[str, Tensor]], preset: str) -> list[dict[str, Any]]:
    """Return a row per predictor: ``predictor``, ``preset``, the seven metrics, ``images``.

    Args:
        predictors: by the name of their row.
        batches: dicts of ``image``, ``depth`` and ``mask``; see ``PanoramicDepth``.
        preset: the evaluation protocol, a key of ``metrics.PRESETS``.

    Raises:
        InputError: for an unknown preset.
    """
    # Not synchronized: every image is scored here, whether or not other processes are still there.
    metrics = {name: DepthMetrics(preset, sync_on_compute=False) for name in predictors}
    for batch in batches:
        for name, predict in predictors.items():
            metrics[name].update(predict(batch["image"]).cpu(), batch["depth"], batch["mask"])
    return [
        {"predictor": name, "preset": preset, **{k: float(v) for k, v in metric.compute().items()}, "images": int(metric.images)}
        for name, metric in metrics.items()
    ]
