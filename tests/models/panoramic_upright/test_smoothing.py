"""Oracle: the dense normal equations, solved by numpy; the filter's width, from an impulse."""

import numpy as np
import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.models.panoramic_upright.smoothing import smooth_up

UP = np.array([0.0, 0.0, 1.0])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("count", [3, 4, 5, 40])
def test_equals_the_dense_solution(count):
    generator = np.random.default_rng(count)
    up = unit(generator.normal(scale=0.2, size=(count, 3)) + UP)
    error_deg = generator.uniform(0.5, 9.0, size=count)
    # The impulse response is half as high as its peak at 1.01341 / a, found here to the digits that the equation gives.
    x = 1.0
    for _ in range(20):
        x += (np.exp(-x) * (np.cos(x) + np.sin(x)) - 0.5) / (2 * np.exp(-x) * np.sin(x))
    stiffness = (0.7 * 12 / (2 * x) / np.sqrt(2)) ** 4
    second = np.diff(np.eye(count), n=2, axis=0)
    weight = np.diag((np.median(error_deg) / error_deg) ** 2)
    expected = unit(np.linalg.solve(weight + stiffness * second.T @ second, weight @ up))
    np.testing.assert_allclose(smooth_up(up, error_deg, 12.0, 0.7, 10.0), expected, atol=2e-4)


@pytest.mark.parametrize("frame_rate_hz", [24.0, 60.0])
def test_a_frame_counts_half_at_half_the_width(frame_rate_hz):
    count = int(4 * frame_rate_hz) + 1
    middle = count // 2
    up = np.tile(UP, (count, 1))
    up[middle] = unit(np.array([0.01, 0.0, 1.0]))
    response = smooth_up(up, np.ones(count), frame_rate_hz, 0.5, 10.0)[:, 0]
    seconds = np.interp(
        -0.5, -response[middle : middle + int(frame_rate_hz / 2)] / response[middle], np.arange(int(frame_rate_hz / 2))
    )
    assert seconds / frame_rate_hz == pytest.approx(0.25, rel=0.02)


def test_a_steady_turn_is_followed_without_lag():
    angle = np.radians(np.linspace(-20, 20, 60))
    up = np.stack([np.sin(angle), 0 * angle, np.cos(angle)], axis=1)
    smoothed = smooth_up(up, np.ones(60), 30.0, 0.5, 10.0)
    assert np.degrees(np.arccos((smoothed * up).sum(axis=1).clip(-1, 1))).max() < 0.1


def test_frames_without_cue_lie_between_their_neighbours():
    up = np.tile(unit(np.array([0.1, 0.0, 1.0])), (200, 1))
    up[100:] = unit(np.array([-0.1, 0.0, 1.0]))
    error_deg = np.ones(200)
    for silent in (slice(0, 30), slice(60, 140), slice(180, 200)):
        error_deg[silent] = np.inf
        up[silent] = np.nan
    error_deg[70] = np.nan
    smoothed = smooth_up(up, error_deg, 30.0, 0.5, 10.0)
    np.testing.assert_allclose(smoothed[:20], np.tile(unit(np.array([0.1, 0.0, 1.0])), (20, 1)), atol=1e-3)
    np.testing.assert_allclose(smoothed[190:], np.tile(unit(np.array([-0.1, 0.0, 1.0])), (10, 1)), atol=1e-3)
    across = smoothed[60:140, 0]
    assert (np.diff(across) < 1e-4).all()
    assert abs(across).max() < 0.105


def test_no_smoothing_and_few_frames_return_the_directions():
    up = unit(np.random.default_rng(0).normal(size=(5, 3)))
    np.testing.assert_allclose(smooth_up(up, np.ones(5), 30.0, 0.0, 10.0), up, atol=1e-15)
    for count in (1, 2):
        np.testing.assert_allclose(smooth_up(up[:count], np.ones(count), 30.0, 0.5, 10.0), up[:count], atol=1e-15)


def test_a_video_without_cue_is_refused():
    with pytest.raises(InputError, match=r"none of 3 has an expected error below max_error_deg = 10; there is nothing"):
        smooth_up(np.tile(UP, (3, 1)), np.array([np.inf, np.nan, 11.0]), 30.0, 0.5, 10.0)
