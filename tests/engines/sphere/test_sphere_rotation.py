"""Oracles: fields in closed form, turned by turning their argument; rolls; Rodrigues' formula from scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from lightning_plugins.engines.sphere import rotate_depth, rotate_equirectangular, rotation_from_up
from tests.engines.sphere.fields import BandLimited, grid_directions, random_rotation


def yaw(columns, width, dtype):
    """Return the turn about z that moves the image right by whole columns: clockwise from above."""
    angle = -2 * math.pi * columns / width
    return torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=dtype)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_harmonics_turn_exactly_and_back(seed):
    field, rotation = BandLimited(8, seed), random_rotation(seed)
    directions = grid_directions(256, 512)
    image = torch.tensor(field(directions), dtype=torch.float32)[None, None]
    matrix = torch.tensor(rotation, dtype=torch.float32)
    turned = rotate_equirectangular(image, matrix, "bicubic")
    # What was in direction d is now in R d: the new image at d is the field at R^T d, which is d @ R for rows.
    assert np.abs(turned[0, 0].numpy() - field(directions @ rotation)).max() < 2e-5
    assert (rotate_equirectangular(turned, matrix.T, "bicubic") - image).abs().max() < 2e-5
    assert np.abs(rotate_equirectangular(image, matrix)[0, 0].numpy() - field(directions @ rotation)).max() < 1e-3


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_and_whole_columns_are_exact(mode, dtype):
    image = torch.randn(1, 2, 64, 128, dtype=dtype)
    assert (rotate_equirectangular(image, torch.eye(3, dtype=dtype), mode) - image).abs().max() < 1e-6
    for columns in (1, 17, 64, -3):
        turned = rotate_equirectangular(image, yaw(columns, 128, dtype), mode)
        assert torch.equal(turned, image.roll(columns, -1))


def test_half_turn_about_forward_flips_both_axes():
    image = torch.randn(1, 1, 16, 32)
    turned = rotate_equirectangular(image, torch.diag(torch.tensor([1.0, -1.0, -1.0])))
    torch.testing.assert_close(turned, image.flip(-1).flip(-2), rtol=0, atol=1e-5)


def test_each_image_may_have_its_own_rotation():
    image = torch.randn(2, 3, 16, 32)
    rotations = torch.tensor(np.stack([random_rotation(0), random_rotation(1)]), dtype=torch.float32)
    turned = rotate_equirectangular(image, rotations)
    for i in range(2):
        torch.testing.assert_close(turned[i : i + 1], rotate_equirectangular(image[i : i + 1], rotations[i]))


def test_gradient_for_the_rotation():
    image = torch.randn(1, 1, 6, 12, dtype=torch.float64)
    rotation = torch.tensor(random_rotation(3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: rotate_equirectangular(image, r), rotation)


def test_depth_of_a_sphere_around_the_camera_stays_and_that_of_a_plane_turns():
    rotation = torch.tensor(random_rotation(4))
    mask = torch.ones(1, 1, 64, 128, dtype=torch.bool)
    depth, valid = rotate_depth(torch.full((1, 1, 64, 128), 2.0), mask, rotation)
    torch.testing.assert_close(depth, torch.full_like(depth, 2.0))
    assert valid.all()
    directions = grid_directions(64, 128)
    inverse = torch.tensor(0.5 + 0.4 * directions @ [0.0, 0.6, 0.8])[None, None]
    turned, _ = rotate_depth(inverse, mask, rotation)
    expected = 0.5 + 0.4 * directions @ rotation.numpy() @ [0.0, 0.6, 0.8]
    assert np.abs(turned[0, 0].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf"), -1.0])
def test_holes_do_not_bleed(poison):
    generator = torch.Generator().manual_seed(0)
    depth = 1 + torch.rand(2, 1, 32, 64, generator=generator)
    mask = torch.rand(2, 1, 32, 64, generator=generator) > 0.3
    turned, valid = rotate_depth(depth.masked_fill(~mask, poison), mask, torch.tensor(random_rotation(5)).float())
    assert 0.5 < valid.float().mean() < 0.9
    assert turned[valid].min() >= 1
    assert turned[valid].max() <= 2
    assert (turned[~valid] == 0).all()
    same, still = rotate_depth(depth, mask, torch.eye(3))
    assert torch.equal(still, mask)
    torch.testing.assert_close(same, depth * mask)


def test_up_goes_to_up_by_the_smallest_angle():
    random = np.random.default_rng(0)
    up = random.normal(size=(200, 3))
    up[:20, :2] *= 1e-4
    up[:10, 2] = -np.abs(up[:10, 2])
    rotations = rotation_from_up(torch.tensor(up)).numpy()
    for vector, rotation in zip(up, rotations, strict=True):
        unit = vector / np.linalg.norm(vector)
        axis = np.cross(unit, [0, 0, 1])
        angle = np.arctan2(np.linalg.norm(axis), unit[2])
        expected = Rotation.from_rotvec(axis / np.linalg.norm(axis) * angle).as_matrix()
        np.testing.assert_allclose(rotation, expected, atol=1e-9)
        np.testing.assert_allclose(rotation @ unit, [0, 0, 1], atol=1e-9)


def test_up_already_up_and_exactly_down():
    up = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0]])
    rotations = rotation_from_up(up)
    torch.testing.assert_close(rotations[0], torch.eye(3))
    torch.testing.assert_close(rotations[1], torch.diag(torch.tensor([1.0, -1.0, -1.0])))


def test_near_down_stays_a_rotation_in_float32_with_finite_gradients():
    up = torch.tensor([[1e-4, -2e-4, -1.0], [0.0, 1e-6, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]], requires_grad=True)
    rotations = rotation_from_up(up)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(4, 3, 3), rtol=0, atol=1e-6)
    rotations.sum().backward()
    assert up.grad.isfinite().all()


def test_a_tilted_image_is_levelled():
    field, tilt = BandLimited(6, seed=7), Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()
    up = tilt @ [0, 0, 1]
    directions = grid_directions(64, 128)
    tilted = torch.tensor(field(directions @ tilt))[None, None]
    level = rotate_equirectangular(tilted, rotation_from_up(torch.tensor(up)), "bicubic")
    left = rotation_from_up(torch.tensor(up)).numpy() @ tilt
    np.testing.assert_allclose(left[2], [0, 0, 1], atol=1e-12)
    assert np.abs(level[0, 0].numpy() - field(directions @ left)).max() < 1e-3


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\) or \(2, 3, 3\), got \(3, 3, 3\)"):
        rotate_equirectangular(torch.zeros(2, 1, 4, 8), torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(1, 1, 4, 8\), got torch.float32"):
        rotate_depth(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), torch.eye(3))
