"""What a depth model leaves of one photograph: a preview, a depth map to measure in, a point cloud to walk through."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.images import resize_panorama
from lightning_plugins.reporting.figures import depth_preview
from lightning_plugins.reporting.files import write_depth_png, write_panorama_cloud

PREVIEW_ROWS = 384
# 2 million points, 31 MB; the depth map keeps the photograph's full size.
CLOUD_ROWS = 1024


def write_photograph(
    folder: Path, name: str, image: NDArray[np.uint8], depth_m: NDArray[np.float32], directions: NDArray[np.float32]
) -> bytes:
    """Write ``name_preview.png``, ``name_depth.png`` (16 bits, millimetres) and ``name_points.ply`` (coloured, metres).

    Photographs of more than 1024 rows have every second, third ... pixel in the point cloud.

    Args:
        folder: where to write; it is made.
        name: of the photograph.
        image: ``(H, W, 3)`` RGB.
        depth_m: ``(H, W)`` metres along the ray.
        directions: ``(H, W, 3)``, the unit vector of each pixel.

    Returns:
        The preview, PNG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_depth_png(folder / f"{name}_depth.png", depth_m)
    step = -(-depth_m.shape[0] // CLOUD_ROWS)
    thinned = (image[::step, ::step], depth_m[::step, ::step], directions[::step, ::step])
    write_panorama_cloud(folder / f"{name}_points.ply", *thinned)
    step = max(1, depth_m.shape[0] // PREVIEW_ROWS)
    small = depth_m[::step, ::step]
    preview = depth_preview(resize_panorama(image, *small.shape), small, title=name)
    with atomic_write(folder / f"{name}_preview.png") as file:
        file.write(preview)
    return preview
