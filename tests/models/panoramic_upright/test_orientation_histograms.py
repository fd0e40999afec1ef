"""Edge directions of great circles, whose angle in every pixel is known, and what a camera may do to them."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.models.panoramic_upright.orientation_histograms import OrientationHistograms

HEIGHT = 64


def directions(height=HEIGHT):
    """By hand: x forward, y left, z up; the first column looks backwards."""
    colatitude = (np.arange(height) + 0.5) * np.pi / height
    longitude = (np.arange(2 * height) + 0.5) * np.pi / height - np.pi
    sine = np.sin(colatitude)[:, None]
    return np.stack([sine * np.cos(longitude), -sine * np.sin(longitude), np.cos(colatitude)[:, None] + 0 * longitude], axis=-1)


def half_space(normal, width_deg=4.0):
    """An image that is bright on one side of a great circle, and the angle of its gradient from east towards south."""
    place = directions()
    normal = np.asarray(normal, dtype=float) / np.linalg.norm(normal)
    image = 1 / (1 + np.exp(-(place @ normal) / np.radians(width_deg / 4)))
    radius = np.hypot(place[..., 0], place[..., 1])
    east = np.stack([place[..., 1] / radius, -place[..., 0] / radius, 0 * radius], axis=-1)
    north = np.cross(place, -east)
    return torch.from_numpy(image).expand(1, 3, -1, -1), np.arctan2(-(north @ normal), east @ normal), np.abs(place @ normal)


def angle_of(histograms):
    """The mean angle of the bins, modulo half a turn."""
    bins = histograms.shape[1]
    turn = torch.arange(bins, dtype=histograms.dtype) * (2 * math.pi / bins)
    return torch.atan2((histograms * turn.sin()[:, None, None]).sum(1), (histograms * turn.cos()[:, None, None]).sum(1)) / 2


@pytest.mark.parametrize("normal", [(1, 0, 0), (0.3, -1, 0), (0.5, 1, 0.4), (1, 0.2, -0.9), (0.1, 0.1, 1)])
def test_an_edge_has_the_direction_of_its_great_circle(normal):
    image, angle, off = half_space(normal)
    found = angle_of(OrientationHistograms(cell=1).double()(image))[0].numpy()
    error_deg = np.degrees(np.abs((found - angle + np.pi / 2) % np.pi - np.pi / 2))
    # Within 75 degrees of latitude: at the poles a pixel's frame turns faster than it is wide.
    on_edge = (off < np.radians(2)) & (np.abs(directions()[..., 2]) < np.sin(np.radians(75)))
    assert on_edge.sum() > 100
    assert np.median(error_deg[on_edge]) < 0.6
    assert error_deg[on_edge].max() < 4


def test_lines_towards_the_poles_fill_the_first_bin():
    image, _, off = half_space((0, 1, 0))
    found = OrientationHistograms(cell=1).double()(image)[0]
    near_edge = torch.from_numpy((off < np.radians(2)) & (np.abs(directions()[..., 2]) < np.sin(np.radians(60))))
    assert (found.argmax(0)[near_edge] == 0).all()
    assert found[4:13, near_edge].max() < 1e-6


def test_a_cell_is_the_mean_of_its_pixels():
    image = torch.rand(2, 3, 16, 32, dtype=torch.float64)
    fine, coarse = (OrientationHistograms(cell=cell).double()(image) for cell in (1, 4))
    assert coarse.shape == (2, 16, 4, 8)
    np.testing.assert_allclose(coarse.numpy(), fine.numpy().reshape(2, 16, 4, 4, 8, 4).mean((3, 5)), rtol=1e-12, atol=1e-15)


def test_cameras_that_turn_mirror_or_expose_otherwise():
    histograms = OrientationHistograms(cell=2).double()
    image = torch.rand(1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = histograms(image)
    torch.testing.assert_close(histograms(image.roll(6, dims=3)), found.roll(3, dims=3), rtol=1e-9, atol=1e-12)
    other_way = [-number % 16 for number in range(16)]
    # The bins' angles are kept in single precision.
    torch.testing.assert_close(histograms(image.flip(3)), found.flip(3)[:, other_way], rtol=1e-3, atol=1e-6)
    # Upside down: half a turn about the line of sight changes no direction of a line.
    torch.testing.assert_close(histograms(image.flip(2, 3)), found.flip(2, 3), rtol=1e-9, atol=1e-12)
    darker = histograms(0.5 * image + 0.2)
    assert 0.8 < darker.sum() / found.sum() <= 1.0


def test_bright_edges_count_little_more_than_faint_ones():
    image, _, _ = half_space((0, 1, 0), width_deg=1.0)
    bright, faint = (OrientationHistograms()(strength * image.float()).amax() for strength in (1.0, 0.1))
    assert 1.0 < bright / faint < 3.0


def test_one_colour_has_no_edges_and_every_image_a_slope():
    histograms = OrientationHistograms()
    assert histograms(torch.full((1, 3, 16, 32), 0.4)).amax() < 1e-4
    for image in (torch.full((1, 3, 16, 32), 0.4), torch.rand(1, 3, 16, 32)):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(histograms(image).sum(), image)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [{"bins": 3}, {"cell": 0}, {"contrast": 0.0}, {"contrast": math.nan}])
def test_bad_values_are_refused(options):
    with pytest.raises(InputError, match="bins must be 4 or more, cell 1 or more and contrast above 0"):
        OrientationHistograms(**options)
