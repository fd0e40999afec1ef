"""Another look at a panorama: any yaw by rolling its columns, the mirror image, other exposure, contrast and colours."""

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class View:
    """What is done to one panorama, and to all that belongs to it.

    The image is turned about its own vertical and mirrored left to right, so that the rotation which levels it is turned and
    mirrored with it: the level image of a view is the view of the level image.

    Attributes:
        shift: columns that the image is rolled by, to the right.
        width: columns of the image.
        mirrored: whether left and right change places after that.
        gain: factors ``(3,)`` of red, green and blue.
        gamma: exponent before the gain.
    """

    shift: int
    width: int
    mirrored: bool
    gain: Array
    gamma: float

    def turn(self, plane: Array) -> Array:
        """Return ``(H, W, ...)``, turned and mirrored."""
        turned = np.roll(plane, self.shift, axis=1)
        return turned[:, ::-1] if self.mirrored else turned

    def turn_direction(self, direction: Array) -> Array:
        """Return where a direction ``(3,)`` of the image points now: x forward, y left, z up."""
        # Longitude grows to the right, which is clockwise seen from above.
        angle = -2.0 * math.pi * self.shift / self.width
        c, s = math.cos(angle), math.sin(angle)
        x, y, z = (float(coordinate) for coordinate in direction)
        x, y = c * x - s * y, s * x + c * y
        return np.array([x, -y if self.mirrored else y, z], dtype=direction.dtype)

    def look(self, image: Array) -> Array:
        """Return ``(H, W, 3)`` float32 in [0, 1], turned, mirrored and in the view's colours."""
        coloured = np.clip(self.turn(image), 1e-4, 1) ** np.float32(self.gamma) * self.gain
        return np.clip(coloured, 0, 1)


def draw_view(width: int, generator: np.random.Generator) -> View:
    """Draw any yaw in whole columns, the mirror image every other time, and colours."""
    shift = int(generator.integers(width))
    mirrored = bool(generator.random() < 0.5)
    gain = np.exp(generator.normal(0, 0.15)) * np.exp(generator.normal(0, 0.06, 3))
    gamma = float(np.exp(generator.normal(0, 0.2)))
    return View(shift, width, mirrored, gain.astype(np.float32), gamma)
