"""Heading, pitch and roll of a panorama, as the Photo Sphere metadata define them, and rotations as such angles.

    M = Rz(-heading) Ry(-pitch) Rx(roll)        world from camera: x north, y west, z up
    up = M^T z = (sin pitch, sin roll cos pitch, cos roll cos pitch)

heading  compass direction of the image's centre, clockwise from north as seen from above, in [0, 360)
pitch    of the image's centre above the horizon, in [-90, 90]
roll     of the camera about its forward axis, clockwise as the photographer sees it: the horizon turns counter-clockwise in the
         image; in (-180, 180]

This is the order of aviation: the camera turns by its heading, then by pitch about its own left axis, then by roll about its
own forward axis. Where the centre looks straight up or down, heading and roll turn about the same axis: roll is then given as 0.

Source: Photo Sphere XMP Metadata, the GPano namespace (developers.google.com/streetview/spherical-metadata).
"""

import math

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError


def pose_from_up(up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pitch and the roll, in degrees, of images whose up-vectors are given.

    Args:
        up: ``(..., 3)``, of any length but zero, in the image's frame; their dtype sets the precision.

    Returns:
        Pitch and roll, each ``(...)``.

    Raises:
        InputError: if the last axis is not 3.
    """
    if up.shape[-1:] != (3,):
        raise InputError(f"up must have shape (..., 3), got {tuple(up.shape)}; give x, y, z in the last axis")
    x, y, z = up.unbind(-1)
    across = torch.hypot(y, z)
    is_axis = across <= 4 * torch.finfo(up.dtype).eps * x.abs()
    roll = torch.atan2(y, z).masked_fill(is_axis, 0.0)
    # atan2 gives -180 for an up of (0, -0.0, -1).
    roll = torch.where(roll == -math.pi, -roll, roll)
    return torch.rad2deg(torch.atan2(x, across)), torch.rad2deg(roll)


def up_from_pose(pitch_deg: Tensor, roll_deg: Tensor) -> Tensor:
    """Return the up-vectors ``(..., 3)``, of length 1, of images of given pitch and roll."""
    pitch, roll = torch.deg2rad(pitch_deg), torch.deg2rad(roll_deg)
    return torch.stack((pitch.sin(), roll.sin() * pitch.cos(), roll.cos() * pitch.cos()), dim=-1)


def rotation_from_pose(yaw_deg: Tensor, pitch_deg: Tensor, roll_deg: Tensor) -> Tensor:
    """Return the rotations M ``(..., 3, 3)`` that take the camera's frame to the world's.

    Args:
        yaw_deg: ``(...)``, clockwise as seen from above: the heading, where the world's x is north.
        pitch_deg: ``(...)``.
        roll_deg: ``(...)``.
    """
    yaw = torch.deg2rad(yaw_deg)
    up = up_from_pose(pitch_deg, roll_deg)
    roll = torch.deg2rad(roll_deg)
    # The level axis across the centre's direction: Rx(-roll) y, in the camera's frame.
    left = torch.stack((torch.zeros_like(roll), roll.cos(), -roll.sin()), dim=-1)
    forward = torch.linalg.cross(left, up)
    cosine, sine = yaw.cos()[..., None], yaw.sin()[..., None]
    return torch.stack((cosine * forward + sine * left, cosine * left - sine * forward, up), dim=-2)


def pose_from_rotation(rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return yaw, pitch and roll in degrees, each ``(...)``, of rotations ``(..., 3, 3)`` from the camera's frame to another.

    For a rotation that levels an image, pitch and roll are those that it undoes, and yaw says where the centre of the tilted
    image comes to lie: so many degrees to the right of the level image's centre. ``rotation_from_pose`` is the inverse.

    Raises:
        InputError: if the last two axes are not 3 x 3.
    """
    if rotation.shape[-2:] != (3, 3):
        raise InputError(f"rotation must have shape (..., 3, 3), got {tuple(rotation.shape)}; give matrices")
    pitch, roll = pose_from_up(rotation[..., 2, :])
    angle = torch.deg2rad(roll)[..., None]
    # What becomes of the level axis across the centre's direction; it is never vertical, as the direction itself may be.
    left = angle.cos() * rotation[..., 1] - angle.sin() * rotation[..., 2]
    yaw = torch.atan2(left[..., 0], left[..., 1])
    return torch.rad2deg(yaw), pitch, roll
