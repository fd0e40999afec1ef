"""Oracle: the distribution functions of the angles in closed form, and counts."""

import math
from collections import Counter

import numpy as np
import pytest

from lightning_plugins.datamodules._tilts import check_tilt, draw_camera_to_level

COUNT = 3000
# Kolmogorov's bound on the distance of distribution functions that chance exceeds once in a thousand times.
BOUND = 1.95 / math.sqrt(COUNT)


def rotations(tilt):
    generator = np.random.default_rng(1)
    return np.array([draw_camera_to_level(tilt, generator) for _ in range(COUNT)])


def rayleigh_cut_at_20(angles_deg):
    return (1 - np.exp(-(angles_deg**2) / 32)) / (1 - math.exp(-400 / 32))


def cap_share(limit_deg):
    return lambda angles_deg: (1 - np.cos(np.radians(angles_deg))) / (1 - math.cos(math.radians(limit_deg)))


@pytest.mark.parametrize(
    ("tilt", "share_below", "largest_deg"),
    [
        ("small", cap_share(20), 20),
        ("sphere", cap_share(180), 180),
        ("mixed", lambda angles_deg: (np.minimum(cap_share(20)(angles_deg), 1) + cap_share(180)(angles_deg)) / 2, 180),
        ("cone:40", cap_share(40), 40),
        ("hand_held", rayleigh_cut_at_20, 20),
        ("whole_degrees", lambda angles_deg: (angles_deg + 0.5) / 180, 179),
    ],
)
def test_angles_and_azimuths_have_the_distribution_of_their_name(tilt, share_below, largest_deg):
    camera_to_level = rotations(tilt)
    np.testing.assert_allclose(
        camera_to_level @ camera_to_level.transpose(0, 2, 1), np.tile(np.eye(3), (COUNT, 1, 1)), atol=1e-12
    )
    assert (np.linalg.det(camera_to_level) > 0).all()
    up = camera_to_level[:, 2]
    angles_deg = np.sort(np.degrees(np.arctan2(np.hypot(up[:, 0], up[:, 1]), up[:, 2])))
    assert np.abs(share_below(angles_deg) - (np.arange(COUNT) + 0.5) / COUNT).max() < BOUND + (
        0.01 if tilt == "whole_degrees" else 0
    )
    assert 0.75 * largest_deg < angles_deg[-1] <= largest_deg + 1e-6
    azimuths = np.sort(np.arctan2(up[:, 1], up[:, 0]))
    assert np.abs((azimuths + math.pi) / (2 * math.pi) - (np.arange(COUNT) + 0.5) / COUNT).max() < BOUND + 1 / 360


def test_whole_degrees_are_whole_and_every_colatitude_is_as_likely():
    up = rotations("whole_degrees")[:, 2]
    colatitudes = np.degrees(np.arctan2(np.hypot(up[:, 0], up[:, 1]), up[:, 2]))
    np.testing.assert_allclose(colatitudes, colatitudes.round(), atol=1e-6)
    azimuths = np.degrees(np.arctan2(up[:, 1], up[:, 0]))[(colatitudes > 0.5)]
    np.testing.assert_allclose(azimuths, azimuths.round(), atol=1e-5)
    assert len(Counter(colatitudes.round())) == 180


def test_a_tilt_is_the_smallest_rotation_to_its_up():
    for rotation in rotations("sphere")[:50]:
        angle = math.acos(np.clip(rotation[2, 2], -1, 1))
        assert (np.trace(rotation) - 1) / 2 == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("tilt", ["smal", "cone", "cone:", "cone:x", "cone:181", "cone:-1", "cone:nan", "20", "", 20])
def test_other_names_are_refused(tilt):
    with pytest.raises(ValueError, match=r"there are no tilts .*; valid are small .* such as cone:40"):
        check_tilt(tilt)
