"""Resizing: exact on constants, seamless, and a shift-free map of smooth functions on the sphere."""

import numpy as np
import pytest
import torch
from lightning_plugins.engines.sphere import resize_equirectangular


def smooth(height: int, width: int) -> torch.Tensor:
    """x, y, z and a product of them at the pixels, straight from the angles: the oracle has no directions of ours."""
    colatitude = np.pi * (np.arange(height) + 0.5)[:, None] / height
    longitude = 2 * np.pi * ((np.arange(width) + 0.5)[None] / width - 0.5)
    x, y = np.sin(colatitude) * np.cos(longitude), np.sin(colatitude) * np.sin(longitude)
    z = np.cos(colatitude) + 0 * longitude
    return torch.from_numpy(np.stack([x, y, z, x * y + 0.5 * z * z]))[None]


@pytest.mark.parametrize(
    ("source", "target"),
    [((64, 128), (32, 64)), ((32, 64), (64, 128)), ((48, 96), (32, 64)), ((100, 200), (64, 128)), ((64, 128), (64, 128))],
)
def test_maps_smooth_functions_onto_themselves(source, target):
    resized = resize_equirectangular(smooth(*source), *target)
    # Linear interpolation errs by curvature x spacing^2 / 8; rows of the poles, where two longitudes meet, by no more.
    tolerance = 2.5 * (np.pi / min(source[0], target[0])) ** 2 / 8 + 1e-12
    assert (resized - smooth(*target)).abs().max() < 4 * tolerance


@pytest.mark.parametrize(("source", "target"), [((64, 128), (32, 64)), ((32, 64), (64, 128))])
def test_knows_no_seam(source, target):
    image = torch.rand(1, 3, *source, dtype=torch.float64)
    step_in, step_out = source[1] // 32, target[1] // 32
    rolled = resize_equirectangular(image.roll(11 * step_in, -1), *target)
    torch.testing.assert_close(rolled, resize_equirectangular(image, *target).roll(11 * step_out, -1))


def test_keeps_constants():
    torch.testing.assert_close(resize_equirectangular(torch.full((1, 1, 30, 60), 3.0), 64, 128), torch.full((1, 1, 64, 128), 3.0))
