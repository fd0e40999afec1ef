"""Oracles: Euler angles from scipy in the order of aviation, cameras turned by hand, and horizons drawn and looked at."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from lightning_plugins.engines.sphere import (
    pose_from_rotation,
    pose_from_up,
    rotate_equirectangular,
    rotation_from_pose,
    rotation_from_up,
    up_from_pose,
)

# y points left and z up here; forward, right, down in aviation.
AVIATION = np.diag([1.0, -1.0, -1.0])


def from_aviation(yaw_deg, pitch_deg, roll_deg):
    turned = Rotation.from_euler("ZYX", [yaw_deg, pitch_deg, roll_deg], degrees=True).as_matrix()
    return AVIATION @ turned @ AVIATION


def tensors(*numbers):
    return [torch.tensor(number, dtype=torch.float64) for number in numbers]


def angles(seed):
    generator = np.random.default_rng(seed)
    return generator.uniform(-180, 180), np.rad2deg(np.arcsin(generator.uniform(-1, 1))), generator.uniform(-180, 180)


@pytest.mark.parametrize("seed", range(8))
def test_angles_are_those_of_aviation_both_ways(seed):
    yaw, pitch, roll = angles(seed)
    expected = from_aviation(yaw, pitch, roll)
    np.testing.assert_allclose(rotation_from_pose(*tensors(yaw, pitch, roll)), expected, atol=1e-12)
    np.testing.assert_allclose(up_from_pose(*tensors(pitch, roll)), expected.T @ [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(pose_from_rotation(torch.tensor(expected)), (yaw, pitch, roll), atol=1e-9)
    np.testing.assert_allclose(pose_from_up(3 * torch.tensor(expected[2])), (pitch, roll), atol=1e-9)


@pytest.mark.parametrize(
    ("up", "pitch", "roll"),
    [
        ([0, 0, 2], 0, 0),
        ([1, 0, 1], 45, 0),  # up leans forward: the camera looks above the horizon
        ([-1, 0, 1], -45, 0),
        ([0, 1, 1], 0, 45),  # up leans left: the camera was turned clockwise
        ([0, -1, 0], 0, -90),
        ([0, 0, -1], 0, 180),
        ([0, -0.0, -1], 0, 180),  # and never -180
        ([1, 0, 0], 90, 0),
        ([-1, 0, 0], -90, 0),
        ([1, 1e-17, -1e-17], 90, 0),
    ],
)
def test_by_hand(up, pitch, roll):
    np.testing.assert_allclose(pose_from_up(torch.tensor(up, dtype=torch.float64)), (pitch, roll), atol=1e-12)


def test_heading_is_clockwise_from_north():
    east = rotation_from_pose(*tensors(90, 0, 0)) @ tensors([1, 0, 0])[0]
    torch.testing.assert_close(east, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))  # y points left of north: west


def seen_from(yaw, pitch, roll):
    """Return what a camera of this pose sees of a world whose sky is white, 90 x 180 pixels."""
    level = torch.zeros(1, 1, 90, 180, dtype=torch.float64)
    level[:, :, :45] = 1
    return rotate_equirectangular(level, rotation_from_pose(*tensors(yaw, pitch, roll)).mT)[0, 0]


def test_the_horizon_sinks_with_pitch_and_turns_counterclockwise_with_roll():
    # In the column of the centre: how far the sky reaches down.
    assert seen_from(0, 20, 0)[:, 90].sum() == pytest.approx(45 + 10, abs=0.6)
    rolled = seen_from(0, 0, 20)
    right, left = rolled[:, 90 + 15].sum(), rolled[:, 90 - 15].sum()
    # Counter-clockwise: the right end of the horizon rises, so that less sky is left above it.
    assert right < 45 < left


@pytest.mark.parametrize("pitch", [90.0, -90.0, 90 - 1e-7, 89.999])
def test_straight_up_and_down_lose_no_rotation(pitch):
    expected = from_aviation(33, pitch, 20)
    yaw, found, roll = pose_from_rotation(torch.tensor(expected))
    assert found == pytest.approx(pitch, abs=1e-6)
    np.testing.assert_allclose(rotation_from_pose(yaw, found, roll), expected, atol=1e-9)
    if abs(pitch) == 90:
        assert roll == 0
        # With roll 0 all of it is yaw.
        assert yaw == pytest.approx(33 - math.copysign(20, pitch), abs=1e-6)


def test_the_smallest_rotation_undoes_the_pose_of_its_up():
    up = torch.tensor(np.random.default_rng(0).normal(size=(50, 3)))
    yaw, pitch, roll = pose_from_rotation(rotation_from_up(up))
    torch.testing.assert_close((pitch, roll), pose_from_up(up))
    forward = rotation_from_up(up)[..., 0]
    torch.testing.assert_close(yaw, torch.rad2deg(torch.atan2(-forward[:, 1], forward[:, 0])))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"up must have shape \(..., 3\), got \(4,\)"):
        pose_from_up(torch.zeros(4))
    with pytest.raises(ValueError, match=r"rotation must have shape \(..., 3, 3\), got \(3,\)"):
        pose_from_rotation(torch.zeros(3))
