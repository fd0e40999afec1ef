"""The two predictors that know nothing of the image: what a model must beat by far to mean anything.

- ``constant_median``: the median of all valid training depths.
- ``row_median``: the median of the valid training depths of each row; it knows that the floor is below and the ceiling above.
"""

import numpy as np
from numpy.typing import NDArray


def trivial_predictors(depth_m: NDArray[np.float32], mask: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    """Return the depth map ``(H, W)`` in metres that each trivial predictor gives for every image.

    Args:
        depth_m: training depths, ``(n, H, W)``.
        mask: True where they are valid, ``(n, H, W)``.
    """
    height, width = depth_m.shape[1:]
    overall = np.median(depth_m[mask])
    rows = [np.median(depth_m[:, v][mask[:, v]]) if mask[:, v].any() else overall for v in range(height)]
    return {
        "constant_median": np.full((height, width), overall, np.float32),
        "row_median": np.repeat(np.asarray(rows, np.float32)[:, None], width, axis=1),
    }
