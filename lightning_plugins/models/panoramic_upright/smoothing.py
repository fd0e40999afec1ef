"""Smoothing of a video's up-vectors: a spline through them, which follows a steady turn without lag.

    x = argmin sum_i w_i |x_i - u_i|^2 + stiffness sum_i |x_{i-1} - 2 x_i + x_{i+1}|^2,    up_i = x_i / |x_i|
    w_i = (median error / error_i)^2

Where all weights are alike, x is u under the two-sided filter exp(-a |t|) (cos a t + sin a |t|), which lets all frequencies below
a sqrt 2 pass and falls off with their fourth power. It is half as high as at 0 where a |t| is HALF_HEIGHT; with a stiffness of
(1 / (a sqrt 2))^4, t in frames, this sets its width in seconds at any frame rate. A frame without cue counts as little as the
worst one with, and stands on the line between its neighbours with cue: across a gap the spline goes straight, beyond the last
cue it stays where it was.

Source: Whittaker, "On a new method of graduation", 1923.
Cost: a few operations a frame.
"""

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.errors import InputError

HALF_HEIGHT = 1.0134
# No estimate counts as exact, so that none alone decides.
MIN_ERROR_DEG = 0.1

Array = NDArray[np.float64]


def smooth_up(up: Array, error_deg: Array, frame_rate_hz: float, width_s: float, max_error_deg: float) -> Array:
    """Smooth the up-vectors of successive frames.

    Args:
        up: ``(N, 3)``, unit vectors; where a frame has none, anything.
        error_deg: ``(N,)``, the error that each expects; above ``max_error_deg``, inf and nan included, a frame has no cue.
        frame_rate_hz: frames in a second.
        width_s: the width of the filter at half its height; 0 smooths nothing.
        max_error_deg: the largest error of an estimate that counts.

    Returns:
        ``(N, 3)``, unit vectors.

    Raises:
        InputError: if no frame has a cue.
    """
    cue = np.flatnonzero(error_deg <= max_error_deg)
    if not len(cue):
        raise InputError(
            f"no frame shows where up is: none of {len(up)} has an expected error below max_error_deg = {max_error_deg:g}; "
            f"there is nothing to level by"
        )
    frames = np.arange(len(up))
    filled = np.stack([np.interp(frames, cue, up[cue, axis]) for axis in range(3)], axis=1)
    if width_s > 0 and len(up) > 2:
        error_deg = np.where(error_deg <= max_error_deg, error_deg, max_error_deg).clip(MIN_ERROR_DEG)
        stiffness = (width_s * frame_rate_hz / (2 * HALF_HEIGHT * np.sqrt(2))) ** 4
        filled = _spline(filled, (np.median(error_deg[cue]) / error_deg) ** 2, stiffness)
    return filled / np.linalg.norm(filled, axis=1, keepdims=True)


def _spline(values: Array, weight: Array, stiffness: float) -> Array:
    """Solve (W + stiffness D^T D) x = W values, D the second differences, by L diagonal L^T, whose L has two bands."""
    count = len(values)
    squares, products = np.zeros(count), np.zeros(count - 1)
    for offset, square in enumerate((1, 4, 1)):
        squares[offset : count - 2 + offset] += square
    products[:-1] -= 2
    products[1:] -= 2
    rows = weight + stiffness * squares
    diagonal, near, far = np.zeros((3, count + 2))  # with two more, which the first rows find at index -1 and -2
    solution = np.zeros((count + 2, 3))
    for i in range(count):
        diagonal[i] = rows[i] - diagonal[i - 1] * near[i - 1] ** 2 - diagonal[i - 2] * far[i - 2] ** 2
        if i < count - 1:
            near[i] = (stiffness * products[i] - diagonal[i - 1] * near[i - 1] * far[i - 1]) / diagonal[i]
        if i < count - 2:
            far[i] = stiffness / diagonal[i]
        solution[i] = weight[i] * values[i] - near[i - 1] * solution[i - 1] - far[i - 2] * solution[i - 2]
    for i in reversed(range(count)):
        solution[i] = solution[i] / diagonal[i] - near[i] * solution[i + 1] - far[i] * solution[i + 2]
    return solution[:count]
