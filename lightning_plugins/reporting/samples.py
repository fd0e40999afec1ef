"""What a validation step hands over for a preview: checked, and turned from batches into single pictures.

A batch is a mapping of ``image`` (B, 3, H, W) in [0, 1] and of ``depth``, ``mask`` and ``prediction``, each (B, 1, H, W) or
(B, H, W), depths in metres. Tensors are converted through their own methods, so that this room needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.errors import InputError

NEEDED = ("image", "depth", "mask", "prediction")
WAY_OUT = "return those, or give PanoramaReport(predict=f), where f(pl_module, batch) returns them"


@dataclass(frozen=True)
class Sample:
    """One panorama with its depths.

    Attributes:
        image: ``(height, width, 3)`` RGB.
        depth_m: ``(height, width)``, the truth.
        mask: ``(height, width)``, true where the truth is valid.
        prediction_m: ``(height, width)``.
    """

    image: NDArray[np.uint8]
    depth_m: NDArray[np.float32]
    mask: NDArray[np.bool_]
    prediction_m: NDArray[np.float32]

    def errors(self) -> dict[str, float]:
        """Mean relative and mean absolute error over the valid pixels; NaN if there is none."""
        valid = self.mask & (self.depth_m > 0) & np.isfinite(self.depth_m)
        if not valid.any():
            return {"abs_rel": float("nan"), "mae_m": float("nan")}
        truth_m = self.depth_m[valid].astype(np.float64)
        error_m = np.abs(self.prediction_m[valid] - truth_m)
        return {"abs_rel": float((error_m / truth_m).mean()), "mae_m": float(error_m.mean())}


def take_samples(output: Any, count: int, source: str) -> list[Sample]:
    """Take the first ``count`` panoramas of a batch, or as many as it has.

    Args:
        output: what a validation step returned.
        count: how many are wanted.
        source: what returned it, for the message.

    Raises:
        InputError: if ``output`` is not a mapping of the four maps in their shapes.
    """
    needs = f"PanoramaReport needs a dict with {', '.join(NEEDED[:-1])} and {NEEDED[-1]} from {source}"
    if not isinstance(output, Mapping):
        raise InputError(f"{needs}, got {type(output).__name__}; {WAY_OUT}")
    missing = [name for name in NEEDED if name not in output]
    if missing:
        given = ", ".join(map(str, output)) or "nothing"
        raise InputError(f"{needs}, got a dict with {given}, without {', '.join(missing)}; {WAY_OUT}")
    image, *maps = (_to_array(output[name], count) for name in NEEDED)
    flat = [value[:, 0] if value.ndim == 4 and value.shape[1] == 1 else value for value in maps]
    if image.ndim != 4 or image.shape[1] != 3 or any(value.shape != (len(image), *image.shape[2:]) for value in flat):
        shapes = ", ".join(f"{name} {tuple(np.shape(output[name]))}" for name in NEEDED)
        raise InputError(f"{needs}, image (B, 3, H, W) and the others (B, 1, H, W) or (B, H, W), got {shapes}; {WAY_OUT}")
    colours = np.rint(np.clip(np.nan_to_num(image), 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    depth_m, mask, prediction_m = flat
    return [Sample(*arrays) for arrays in zip(colours, depth_m, mask > 0.5, prediction_m, strict=True)]


def _to_array(value: Any, count: int) -> NDArray[np.float32]:
    first = value[:count]
    return np.asarray(first.detach().float().cpu().numpy() if hasattr(first, "detach") else first, dtype=np.float32)
