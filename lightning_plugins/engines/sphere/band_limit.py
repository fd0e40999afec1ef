"""What a row near a pole can carry: equirectangular rows oversample the sphere by 1 / sin(colatitude).

A function on the sphere that is band-limited to degree L has, in the row at colatitude t, hardly any longitudinal order above
L sin(t). Removing higher orders leaves the equator untouched and makes the pole rows as smooth as the sphere is there: one
point has one depth, whichever way it is approached.
"""

from math import pi

import torch
from torch import Tensor


def limit_longitude_band(image: Tensor) -> Tensor:
    """Remove from each row the longitudinal orders that its circle on the sphere cannot carry at the grid's resolution.

    Linear, keeps each row's mean, commutes with rolls by whole columns, differentiable. Half precision is computed in float32.

    Args:
        image: ``(B, C, H, W)``.
    """
    height, width = image.shape[-2:]
    compute = image if image.dtype in (torch.float32, torch.float64) else image.float()
    colatitude = (torch.arange(height, device=image.device, dtype=compute.dtype) + 0.5) * (pi / height)
    order = torch.arange(width // 2 + 1, device=image.device, dtype=compute.dtype)
    keep = (width / 2 * colatitude.sin()[:, None] + 1 - order).clamp(0, 1)
    return torch.fft.irfft(torch.fft.rfft(compute, dim=-1) * keep, n=width, dim=-1).to(image.dtype)
