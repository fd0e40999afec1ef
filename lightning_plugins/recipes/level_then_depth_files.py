"""What the recipe ``level_then_depth`` makes of one photograph or held-out room, all of it in the level frame."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_plugins import PanoramicDepth, PanoramicUpright
from lightning_plugins._support.images import resize_panorama
from lightning_plugins.engines.sphere import pixel_directions, rotate_in_tiles, rotation_from_up
from lightning_plugins.recipes.panoramic_upright_files import PREVIEW_ROWS, estimate_up
from lightning_plugins.reporting.files import write_image_png
from lightning_plugins.reporting.photographs import write_photograph
from lightning_plugins.reporting.upright_report import draw_before_and_after


def level_and_measure(
    upright: PanoramicUpright, depth: PanoramicDepth, name: str, image: NDArray[np.uint8], folder: Path
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Write level image, depth map, point cloud (z up) and preview of one photograph to ``folder``.

    A photograph whose estimate is unsure is taken as it is, and its row says so.

    Returns:
        A row of ``levelled.csv``, with the rotation level = R tilted, and pictures by caption.
    """
    found = estimate_up(upright, image)
    rotation = rotation_from_up(found.up) if found.is_sure else torch.eye(3)
    level = rotate_in_tiles(image, rotation)
    write_image_png(folder / f"{name}_level.png", level)
    depth_m = depth.predict_panorama(torch.from_numpy(level).permute(2, 0, 1).float() / 255).cpu().numpy()
    preview = write_photograph(folder, name, level, depth_m, pixel_directions(*depth_m.shape).numpy())
    x, y, z = rotation[2].tolist()
    row: dict[str, Any] = {
        "name": name,
        "became": "levelled" if found.is_sure else "left as it was: no cue of up",
        "tilt_deg": round(math.degrees(math.atan2(math.hypot(x, y), z)), 2),
        "expected_error_deg": round(found.expected_error_deg, 2),
    }
    row |= {f"r{i}{j}": float(rotation[i, j]) for i in range(3) for j in range(3)}
    rows = min(PREVIEW_ROWS, len(image))
    before, after = (resize_panorama(pixels, rows, 2 * rows) for pixels in (image, level))
    title = f"{name}: {row['became']}; tilt {row['tilt_deg']:.1f} degrees, give or take {row['expected_error_deg']:.1f}"
    return row, {title: draw_before_and_after(before, after, title), f"{name}, level: depth, 0 to 10 m": preview}
