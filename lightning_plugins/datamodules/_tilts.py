"""How cameras are tilted: the distributions of up-vectors by name.

    small            even by solid angle within 20 degrees of the image's vertical
    sphere           even over the whole sphere
    mixed            half of them as small, half as sphere: for a model that finds any tilt and still tells the last degrees
    cone:ANGLE       even within that many degrees, from 0 to 180
    hand_held        angles with the density of two equal Gaussian slips, forwards and sideways (Rayleigh, sigma 4 degrees), cut
                     at 20 degrees: half are below 4.7 degrees, one in a hundred is above 12.1
    whole_degrees    the protocol published on SUN360: a colatitude from 0 to 179 and an azimuth from 0 to 359, whole degrees
                     and each as likely; steep tilts are as frequent as slight ones, so this is not even over the sphere

Azimuths are even in all of them, and a tilt is the smallest rotation to its up-vector: it adds no yaw.
"""

import math

import numpy as np
import numpy.typing as npt

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.rendering.render import draw_tilt, tilt_rotation

CONES_DEG = {"small": 20.0, "sphere": 180.0}
HAND_HELD_SIGMA_DEG = 4.0
HAND_HELD_LIMIT_DEG = 20.0


def draw_camera_to_level(tilt: str, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a rotation ``(3, 3)`` from the camera's frame to the levelled one; its last row is up in the camera's frame.

    Args:
        tilt: a distribution, as above.
        generator: the only source of randomness.

    Raises:
        InputError: if there is no such distribution.
    """
    if tilt == "hand_held":
        # Of all angles, the share that a Rayleigh distribution cut at the limit has below t is this, solved for t.
        cut = 1.0 - math.exp(-0.5 * (HAND_HELD_LIMIT_DEG / HAND_HELD_SIGMA_DEG) ** 2)
        angle_deg = HAND_HELD_SIGMA_DEG * math.sqrt(-2.0 * math.log1p(-cut * generator.random()))
        return tilt_rotation(math.cos(math.radians(angle_deg)), 2.0 * math.pi * generator.random())
    if tilt == "whole_degrees":
        colatitude_deg, azimuth_deg = (int(generator.integers(steps)) for steps in (180, 360))
        return tilt_rotation(math.cos(math.radians(colatitude_deg)), math.radians(azimuth_deg))
    if tilt == "mixed":
        tilt = "small" if generator.random() < 0.5 else "sphere"
    return draw_tilt(generator, _cone_deg(tilt))


def check_tilt(tilt: str) -> str:
    """Return ``tilt`` if it names a distribution.

    Raises:
        InputError: if it does not.
    """
    draw_camera_to_level(tilt, np.random.default_rng(0))
    return tilt


def _cone_deg(tilt: str) -> float:
    if tilt in CONES_DEG:
        return CONES_DEG[tilt]
    name, _, angle = str(tilt).partition(":")
    try:
        angle_deg = float(angle)
    except ValueError:
        angle_deg = math.nan
    if name != "cone" or not 0.0 <= angle_deg <= 180.0:
        raise InputError(
            f"there are no tilts {tilt!r}; valid are small (within 20 degrees), sphere, mixed, hand_held, whole_degrees, and "
            f"cone:ANGLE with 0 to 180 degrees, such as cone:40"
        )
    return angle_deg
