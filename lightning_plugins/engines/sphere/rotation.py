"""Rotation of equirectangular images and depth.

A rotation R turns the scene: what was seen in direction d is then seen in R d. Backwards, the output in direction d samples the
input at R^T d. Radial depth is the same number from every orientation, so it needs resampling only. Rotations are matrices or
up-vectors, never three angles, whose names and order differ between libraries.
"""

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import pixel_directions
from lightning_plugins.engines.sphere.resampling import sample_equirectangular


def rotate_equirectangular(image: Tensor, rotation: Tensor, mode: str = "bilinear") -> Tensor:
    """Rotate equirectangular images.

    Args:
        image: ``(B, C, H, W)``; differentiable.
        rotation: ``(3, 3)`` for all, or ``(B, 3, 3)``; differentiable unless the mode is nearest. Its dtype sets the precision
            of the coordinates.
        mode: ``nearest``, ``bilinear`` or ``bicubic``.

    Returns:
        ``(B, C, H, W)``. The identity and turns about z by whole pixels return the image's own numbers.

    Raises:
        InputError: if a shape or the mode is none of these.
    """
    if rotation.shape not in ((3, 3), (len(image), 3, 3)):
        raise InputError(f"rotation must have shape (3, 3) or ({len(image)}, 3, 3), got {tuple(rotation.shape)}; give matrices")
    height, width = image.shape[-2:]
    directions = pixel_directions(height, width, dtype=rotation.dtype, device=rotation.device)
    return sample_equirectangular(image, torch.matmul(directions, rotation.unsqueeze(-3)), mode)


def rotate_depth(depth: Tensor, mask: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate radial depth and its validity, so that what a hole holds never reaches a value.

    A value is the mean of the valid pixels among its four neighbours, weighted bilinearly; it is valid itself when these hold at
    least half of the weight.

    Args:
        depth: ``(B, 1, H, W)``; holes may hold anything, also nan and inf.
        mask: ``(B, 1, H, W)``, bool, true where depth is valid.
        rotation: ``(3, 3)`` or ``(B, 3, 3)``.

    Returns:
        Depth with 0 in the holes, and its mask.

    Raises:
        InputError: if the mask is not bool or its shape not that of the depth.
    """
    if mask.dtype != torch.bool or mask.shape != depth.shape:
        raise InputError(
            f"mask must be bool of shape {tuple(depth.shape)}, got {mask.dtype} of shape {tuple(mask.shape)}; depth > 0 makes one"
        )
    filled = torch.where(mask, depth, 0.0)
    weighted, weight = rotate_equirectangular(torch.cat((filled, mask.to(depth.dtype)), dim=1), rotation).chunk(2, dim=1)
    valid = weight >= 0.5
    return torch.where(valid, weighted / weight.clamp(min=0.5), 0.0), valid


def rotation_from_up(up: Tensor) -> Tensor:
    """Return the smallest rotation that takes each up-vector to +z.

    An up-vector of -z has no smallest rotation: it gets the half turn about x, which leaves forward where it is.

    Args:
        up: ``(..., 3)``, of any length but zero; differentiable.

    Returns:
        ``(..., 3, 3)``.
    """
    x, y, z = torch.nn.functional.normalize(up, dim=-1).unbind(-1)
    is_axis = (x == 0) & (y == 0)
    square = (x * x + y * y).masked_fill(is_axis, 1.0)
    # (1 - z) / (x^2 + y^2) equals 1 / (1 + z), without the cancellation near -z.
    factor = torch.where(z > 0, 1 / (1 + z.clamp(min=0)), (1 - z) / square)
    xx, xy, yy = factor * x * x, factor * x * y, torch.where(is_axis, 1 - z, factor * y * y)
    rows = (torch.stack((1 - xx, -xy, -x), -1), torch.stack((-xy, 1 - yy, -y), -1), torch.stack((x, y, z), -1))
    return torch.stack(rows, dim=-2)
