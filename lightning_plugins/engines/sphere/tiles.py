"""Rotation of whole 8-bit photographs in tiles of rows: the memory of a few rows beside the photograph and its copy.

``rotate_equirectangular`` holds the directions, indices and taps of every pixel at once. Here the photograph is padded once, as
bytes, and read tile by tile. The result is that of ``sample_equirectangular``, rounded.
Cost: benchmarks/results/upright_files.csv.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import pixel_directions
from lightning_plugins.engines.sphere.padding import pad_equirectangular
from lightning_plugins.engines.sphere.resampling import sample_padded
from lightning_plugins.engines.sphere.tables import margin_of


@torch.no_grad()
def rotate_in_tiles(image: NDArray[np.uint8], rotation: Tensor, mode: str = "bicubic", tile_rows: int = 16) -> NDArray[np.uint8]:
    """Rotate a photograph of any size.

    Args:
        image: ``(H, W, C)``, 8 bits.
        rotation: ``(3, 3)``; what was seen in direction d is then seen in R d. Its dtype sets the precision of the coordinates,
            to which float32 adds about 0.001 pixel at 8192 columns.
        mode: ``nearest``, ``bilinear`` or ``bicubic``; where bicubic overshoots, it is cut off at 0 and 255.
        tile_rows: rows that are computed at once; the result does not depend on them.

    Returns:
        ``(H, W, C)``, 8 bits.

    Raises:
        InputError: if the image, the rotation or the mode is none of these, W is odd, or ``tile_rows`` is below 1.
    """
    if image.ndim != 3 or image.dtype != np.uint8:
        raise InputError(f"image must have shape (H, W, C) and 8 bits, got {image.shape} of {image.dtype}; convert it first")
    if rotation.shape != (3, 3):
        raise InputError(f"rotation must have shape (3, 3), got {tuple(rotation.shape)}; give one matrix")
    if tile_rows < 1:
        raise InputError(f"tile_rows must be 1 or more, got {tile_rows}; 16 is a good number")
    height, width, _ = image.shape
    padded = pad_equirectangular(torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None], margin_of(mode))
    # The directions of a column and of a row: all others follow, d = (m_x e_x, m_x e_y, m_z), and with them R^T d.
    meridian = pixel_directions(height, 1, dtype=rotation.dtype).squeeze(1)
    equator = pixel_directions(1, width, dtype=rotation.dtype).squeeze(0)
    level = equator[:, :2] @ rotation[:2]
    result = np.empty_like(image)
    for top in range(0, height, tile_rows):
        rows = meridian[top : top + tile_rows, None]
        directions = rows[..., :1] * level + rows[..., 2:] * rotation[2]
        values = sample_padded(padded, directions, height, width, mode)[0]
        if values.is_floating_point():
            values = values.round_().clamp_(0, 255).to(torch.uint8)
        result[top : top + tile_rows] = values.permute(1, 2, 0).numpy()
    return result
