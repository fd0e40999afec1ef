"""Pixels of an equirectangular image as directions, and back.

The frame is right-handed: x points forward (the centre of the image), y to the LEFT, z up. A pixel centre (u, v) of an image
of H rows and W columns has

    colatitude = pi (v + 0.5) / H            0 at the zenith, pi at the nadir
    longitude  = 2 pi ((u + 0.5) / W - 0.5)  0 at the centre, growing to the right: clockwise, seen from above
    direction  = (sin colat cos lon, -sin colat sin lon, cos colat)

The minus sign is what makes the frame right-handed; with a plus every point cloud comes out mirrored. The azimuth of the usual
spherical coordinates is therefore minus the longitude. The solid angle of a pixel is exact, (cos top - cos bottom) 2 pi / W,
so that the pixels sum to 4 pi. All is computed in float64 and cast at the end, save what depends on the caller's directions.
"""

import math

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError


def check_size(height: int, width: int) -> None:
    """Refuse sizes that no equirectangular image has.

    Raises:
        InputError: if a size is below 1.
    """
    if height < 1 or width < 1:
        raise InputError(
            f"an equirectangular image needs 1 row and 1 column or more, got {height} x {width}; most are twice as wide as high"
        )


def pixel_directions(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return the unit direction of every pixel centre, shape ``(height, width, 3)``.

    Raises:
        InputError: if a size is below 1.
    """
    check_size(height, width)
    colatitude = (torch.arange(height, dtype=torch.float64, device=device) + 0.5) * (math.pi / height)
    longitude = ((torch.arange(width, dtype=torch.float64, device=device) + 0.5) / width - 0.5) * (2 * math.pi)
    sine = colatitude.sin()[:, None]
    x = sine * longitude.cos()
    y = -sine * longitude.sin()
    z = colatitude.cos()[:, None].expand(height, width)
    return torch.stack((x, y, z), dim=-1).to(dtype)


def directions_to_pixels(directions: Tensor, height: int, width: int) -> Tensor:
    """Return the continuous pixel coordinates ``(u, v)`` of directions, shape ``(..., 2)``.

    Whole numbers are pixel centres; u lies in [-0.5, width - 0.5] and v in [-0.5, height - 0.5]. Differentiable; the two poles,
    whose longitude is arbitrary, get longitude 0 and no gradient.

    Args:
        directions: ``(..., 3)``, of any length but zero.

    Raises:
        InputError: if the last axis is not 3, or a size is below 1.
    """
    check_size(height, width)
    if directions.shape[-1] != 3:
        raise InputError(f"directions must have shape (..., 3), got {tuple(directions.shape)}; give x, y, z in the last axis")
    x, y, z = directions.unbind(-1)
    is_pole = (x == 0) & (y == 0)
    radius = torch.hypot(x.masked_fill(is_pole, 1.0), y).masked_fill(is_pole, 0.0)
    longitude = torch.atan2(-y.masked_fill(is_pole, 0.0), x.masked_fill(is_pole, 1.0))
    u = longitude * (width / (2 * math.pi)) + (0.5 * width - 0.5)
    v = torch.atan2(radius, z) * (height / math.pi) - 0.5
    return torch.stack((u, v), dim=-1)


def solid_angles(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return the solid angle in steradians of one pixel in each row, shape ``(height,)``; ``width`` times their sum is 4 pi.

    Raises:
        InputError: if a size is below 1.
    """
    check_size(height, width)
    centre = (torch.arange(height, dtype=torch.float64, device=device) + 0.5) * (math.pi / height)
    # cos(a - h) - cos(a + h) = 2 sin(a) sin(h): the same number without the cancellation near the poles.
    return (centre.sin() * (2 * math.sin(0.5 * math.pi / height) * 2 * math.pi / width)).to(dtype)
