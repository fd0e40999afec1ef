"""Oracle: the convention written out in numpy; the exact area of a band of the sphere."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import directions_to_pixels, pixel_directions, solid_angles
from tests.engines.sphere.fields import grid_directions


@pytest.mark.parametrize(("height", "width"), [(4, 8), (5, 6), (3, 7), (64, 128)])
def test_directions_follow_the_convention(height, width):
    np.testing.assert_allclose(pixel_directions(height, width, dtype=torch.float64), grid_directions(height, width), atol=1e-15)


def test_the_frame_is_forward_left_up_and_right_handed():
    directions = pixel_directions(64, 128)
    left_of_centre, right_of_centre = directions[32, 32], directions[32, 96]
    assert directions[32, 64, 0] > 0.99
    assert left_of_centre[1] > 0.99
    assert right_of_centre[1] < -0.99
    assert directions[0, 0, 2] > 0.99
    forward, left, up = directions[32, 64], directions[32, 32], directions[0, 64]
    assert torch.linalg.det(torch.stack((forward, left, up))) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_and_directions_are_inverse(dtype):
    height, width = 24, 50
    pixels = directions_to_pixels(pixel_directions(height, width, dtype=dtype), height, width)
    v, u = torch.meshgrid(torch.arange(height, dtype=dtype), torch.arange(width, dtype=dtype), indexing="ij")
    assert pixels.dtype == dtype
    torch.testing.assert_close(pixels, torch.stack((u, v), dim=-1), rtol=0, atol=200 * torch.finfo(dtype).eps)


def test_length_does_not_matter_and_poles_have_a_pixel():
    directions = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -0.1], [5.0, 0.0, 0.0]])
    expected = torch.tensor([[7.5, -0.5], [7.5, 7.5], [7.5, 3.5]])
    torch.testing.assert_close(directions_to_pixels(directions, 8, 16), expected)


def test_gradient_is_finite_at_the_poles_and_right_elsewhere():
    pole = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    directions_to_pixels(pole, 8, 16).sum().backward()
    assert pole.grad.isfinite().all()
    elsewhere = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: directions_to_pixels(d, 8, 16), elsewhere)


@pytest.mark.parametrize(("height", "width"), [(2, 4), (5, 9), (64, 128), (513, 1024)])
def test_solid_angles_are_exact_and_sum_to_the_sphere(height, width):
    edges = np.cos(np.pi * np.arange(height + 1) / height)
    expected = (edges[:-1] - edges[1:]) * 2 * np.pi / width
    angles = solid_angles(height, width, dtype=torch.float64)
    np.testing.assert_allclose(angles, expected, rtol=1e-10)
    assert abs(angles.sum().item() * width - 4 * math.pi) < 1e-13


@pytest.mark.parametrize("function", [pixel_directions, solid_angles])
@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0)])
def test_impossible_grids_are_refused(function, height, width):
    with pytest.raises(ValueError, match=f"1 row and 1 column or more, got {height} x {width}"):
        function(height, width)


def test_directions_of_two_components_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\), got \(5, 2\)"):
        directions_to_pixels(torch.zeros(5, 2), 4, 8)
