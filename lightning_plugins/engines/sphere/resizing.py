"""Resizing equirectangular images without a seam: the image is padded over seam and poles, resized, and cropped again."""

from math import gcd

import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.engines.sphere.padding import pad_equirectangular

# Triangle filters reach one output pixel when they shrink, one input pixel when they enlarge; 2 covers both.
MARGIN = 2


def resize_equirectangular(image: Tensor, height: int, width: int) -> Tensor:
    """Return ``image`` at another size, bilinear with antialiasing, continuous across the seam and the poles.

    Args:
        image: ``(B, C, H, W)``; W even.
        height: rows of the result.
        width: columns of the result.
    """
    rows_in, rows_out = _margins(image.shape[-2], height)
    columns_in, columns_out = _margins(image.shape[-1], width)
    padded = pad_equirectangular(image, (rows_in, columns_in))
    size = (height + 2 * rows_out, width + 2 * columns_out)
    resized = F.interpolate(padded, size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized[..., rows_out : rows_out + height, columns_out : columns_out + width]


def _margins(source: int, target: int) -> tuple[int, int]:
    # Margins of source and target must have the ratio of the sizes, or the crop would shift the image by a fraction of a pixel.
    common = gcd(source, target)
    step_in, step_out = source // common, target // common
    count = max(-(-MARGIN // step_in), -(-MARGIN // step_out))
    while count > 1 and count * step_in > source:
        count -= 1
    return count * step_in, count * step_out
