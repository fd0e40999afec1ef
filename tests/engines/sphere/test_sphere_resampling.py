"""Oracles: band-limited fields in closed form; a bilinear reading of one target at a time."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import Resample, fibonacci_sphere, icosphere, pixel_directions, sample_equirectangular
from tests.engines.sphere.fields import BandLimited, grid_directions, random_rotation, read_bilinear


def directions_everywhere(count, seed=0):
    """Return random directions, with both poles' and the seam's surroundings over-represented."""
    directions = np.random.default_rng(seed).normal(size=(count, 3))
    directions[: count // 4, :2] *= 0.01
    directions[count // 4 : count // 2, 1] *= 0.01
    return directions


def test_bilinear_equals_the_reading_one_by_one():
    image = torch.randn(2, 3, 10, 20, dtype=torch.float64)
    directions = directions_everywhere(400)
    sampled = sample_equirectangular(image, torch.tensor(directions))
    assert sampled.shape == (2, 3, 400)
    for b, c in ((0, 0), (1, 2)):
        expected = [read_bilinear(image[b, c].numpy(), d) for d in directions]
        np.testing.assert_allclose(sampled[b, c], expected, atol=1e-9)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_pixel_directions_read_the_pixels_themselves(mode):
    for dtype in (torch.float32, torch.float64):
        image = torch.randn(2, 3, 32, 64, dtype=dtype)
        assert torch.equal(sample_equirectangular(image, pixel_directions(32, 64, dtype=dtype), mode), image)


def test_nearest_shows_the_pixel_whose_centre_is_nearest_in_rows_and_columns():
    image = torch.arange(6 * 12.0).view(1, 1, 6, 12)
    directions = directions_everywhere(500, seed=1)
    sampled = sample_equirectangular(image, torch.tensor(directions), "nearest")[0, 0].long().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    row = np.minimum((np.arccos(directions[:, 2]) * 6 / np.pi).astype(int), 5)
    column = ((np.arctan2(-directions[:, 1], directions[:, 0]) / (2 * np.pi) + 0.5) * 12).astype(int) % 12
    np.testing.assert_array_equal(sampled, row * 12 + column)


def test_each_image_may_have_its_own_directions():
    image = torch.randn(2, 3, 8, 16)
    directions = torch.tensor(directions_everywhere(2 * 5 * 7), dtype=torch.float32).view(2, 5, 7, 3)
    sampled = sample_equirectangular(image, directions)
    for i in range(2):
        torch.testing.assert_close(sampled[i : i + 1], sample_equirectangular(image[i : i + 1], directions[i]))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradients_for_image_and_directions(mode):
    image = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    directions = torch.tensor(directions_everywhere(12), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, d: sample_equirectangular(x, d, mode), (image, directions))


def test_nan_directions_give_nan_and_leave_the_others():
    directions = torch.tensor([[1.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]])
    sampled = sample_equirectangular(torch.ones(1, 1, 4, 8), directions)[0, 0]
    assert sampled[0] == 1
    assert sampled[1].isnan()


def test_harmonics_survive_the_way_to_points_and_back():
    field, points = BandLimited(8, seed=0), icosphere(6, dtype=torch.float64)
    image = torch.tensor(field(grid_directions(256, 512)), dtype=torch.float32)[None, None]
    values = Resample.grid_to_points(256, 512, points, mode="bicubic")(image)
    assert np.abs(values[0, 0].numpy() - field(points.numpy())).max() < 1e-5
    back = Resample.points_to_grid(points, 256, 512)(values)
    assert (back - image).abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_the_cached_reading_equals_the_free_one(mode):
    image, points = torch.randn(2, 3, 8, 16), torch.tensor(directions_everywhere(100))
    resample = Resample.grid_to_points(8, 16, points, mode=mode)
    torch.testing.assert_close(resample(image), sample_equirectangular(image, points, mode), rtol=0, atol=2e-6)


def test_linear_functions_of_few_neighbours_and_constants_are_kept():
    points, targets = fibonacci_sphere(300), torch.tensor(directions_everywhere(200))
    constant = torch.ones(1, 2, 300)
    for neighbours in (1, 2, 3, 4, 7):
        resample = Resample.points_to_points(points, targets, neighbours=neighbours)
        torch.testing.assert_close(resample(constant), torch.ones(1, 2, 200), rtol=0, atol=5e-7)
    torch.testing.assert_close(Resample.points_to_points(points, points)(points.T[None]), points.T[None], rtol=0, atol=1e-6)


def test_pooling_reads_the_nearest_points_with_falling_weights():
    fine, coarse = fibonacci_sphere(400, dtype=torch.float64), fibonacci_sphere(100, dtype=torch.float64)
    resample = Resample.points_to_points(fine, coarse, neighbours=4)
    matrix = resample(torch.eye(400)[None])[0].T.double().numpy()
    distance = torch.cdist(coarse, fine).numpy()
    for target in range(100):
        read = np.argsort(distance[target])[:4]
        weight = np.exp(-(distance[target, read] ** 2) * 400 / (4 * np.pi))
        np.testing.assert_allclose(matrix[target, read], weight / weight.sum(), atol=1e-6)
        assert np.count_nonzero(matrix[target]) == 4


def test_error_of_points_falls_with_their_number():
    field, targets = BandLimited(8, seed=2), grid_directions(32, 64)
    errors = []
    for level in (2, 3, 4):
        points = icosphere(level, dtype=torch.float64) @ torch.tensor(random_rotation(0))
        values = torch.tensor(field(points.numpy()), dtype=torch.float32)[None, None]
        errors.append(np.abs(Resample.points_to_grid(points, 32, 64)(values)[0, 0].numpy() - field(targets)).max())
    assert errors[1] < errors[0] / 2.5
    assert errors[2] < errors[1] / 2.5


def test_gradient_is_the_adjoint_also_twice():
    resample = Resample.points_to_grid(fibonacci_sphere(30), 4, 8).double()
    values = torch.randn(2, 3, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(resample, values)
    assert torch.autograd.gradgradcheck(lambda x: resample(x).pow(3), values)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_a_float64_image_is_read_in_float64(mode):
    """The module was made in float32; its tables are exact all the same."""
    image, points = torch.randn(1, 2, 8, 16, dtype=torch.float64), torch.tensor(directions_everywhere(100))
    resampled = Resample.grid_to_points(8, 16, points, mode=mode)(image)
    assert resampled.dtype == torch.float64
    torch.testing.assert_close(resampled, sample_equirectangular(image, points, mode), rtol=0, atol=1e-12)
    if mode == "bilinear":
        expected = [read_bilinear(image[0, 1].numpy(), d) for d in points.numpy()]
        np.testing.assert_allclose(resampled[0, 1], expected, atol=1e-12)


def test_to_the_grid_points_and_back_is_the_identity_in_float64():
    points = pixel_directions(8, 16, dtype=torch.float64).view(-1, 3)
    image = torch.randn(1, 2, 8, 16, dtype=torch.float64)
    there = Resample.grid_to_points(8, 16, points)(image)
    back = Resample.points_to_grid(points, 8, 16)(there)
    assert (back - image).abs().max() < 1e-9


def test_wrong_shapes_and_modes_are_refused():
    image = torch.zeros(2, 1, 4, 8)
    with pytest.raises(ValueError, match=r"nearest, bilinear, bicubic, got 'cubic'"):
        sample_equirectangular(image, torch.ones(3, 3), "cubic")
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got \(1, 4, 8\)"):
        sample_equirectangular(image[0], torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"for a set of points per image give \(2, 1, N, 3\)"):
        sample_equirectangular(image, torch.ones(3, 1, 5, 3))
    with pytest.raises(ValueError, match=r"reads \(B, C, 30\), got \(1, 1, 31\)"):
        Resample.points_to_grid(fibonacci_sphere(30), 4, 8)(torch.zeros(1, 1, 31))
    with pytest.raises(ValueError, match=r"mode bilinear needs floating point values, got torch\.uint8"):
        sample_equirectangular(image.byte(), torch.ones(3, 3))
    with pytest.raises(ValueError, match="must be even, got 7"):
        sample_equirectangular(torch.zeros(1, 1, 4, 7), torch.ones(3, 3))
