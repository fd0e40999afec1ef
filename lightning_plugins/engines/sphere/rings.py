"""Latitude rings: a near-uniform sampling that keeps a symmetry about the vertical axis.

Row r of ``rows`` lies at colatitude t = pi (r + 1/2) / rows and holds the multiple of ``symmetry`` nearest to ``2 rows sin(t)``
points, so that neighbours are pi / rows apart within a ring and between rings. Turning the sphere by 360 / symmetry degrees maps
the sampling onto itself; Fibonacci points and icospheres have no such turn to match the columns of an equirectangular image.
Each ring is turned by its own multiple of the golden angle: without it rings line up, and four points on a circle leave open
which three of them surround a place, so that tables of neighbours would lose the symmetry to rounding.
"""

from math import pi, sin, sqrt

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError

GOLDEN = (sqrt(5) - 1) / 2


def latitude_rings(
    rows: int, symmetry: int = 1, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return about ``4 rows^2 / pi`` unit vectors ``(N, 3)``, zenith first.

    Args:
        rows: number of rings.
        symmetry: the sampling repeats this often around the vertical axis.
        dtype: of the result; it is computed in float64.
        device: of the result.

    Raises:
        InputError: if either number is below 1.
    """
    if rows < 1 or symmetry < 1:
        raise InputError(f"rows and symmetry must be 1 or more, got {rows} and {symmetry}; 16 rows give about 326 points")
    rings = []
    for row in range(rows):
        colatitude = pi * (row + 0.5) / rows
        count = symmetry * max(1, round(2 * rows * sin(colatitude) / symmetry))
        azimuth = (torch.arange(count, dtype=torch.float64) + GOLDEN * row % 1) * (2 * pi / count)
        z = torch.full_like(azimuth, colatitude).cos()
        rings.append(torch.stack([azimuth.cos() * sin(colatitude), azimuth.sin() * sin(colatitude), z], dim=1))
    return torch.cat(rings).to(dtype=dtype, device=device)
