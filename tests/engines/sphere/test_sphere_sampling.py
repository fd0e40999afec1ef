"""Oracles: what an icosahedron and Gonzalez' lattice are known to be; scipy's convex hull and brute force for neighbours."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from lightning_plugins.engines.sphere import SpherePoints, fibonacci_sphere, icosphere, latitude_rings
from lightning_plugins.engines.sphere.nearest import nearest_points
from lightning_plugins.engines.sphere.tables import points_table
from tests.engines.sphere.fields import random_rotation


def neighbour_counts(points):
    """Return how many neighbours each point has in the convex hull."""
    hull = ConvexHull(points)
    edges = {tuple(sorted(pair)) for a, b, c in hull.simplices for pair in ((a, b), (b, c), (c, a))}
    return np.bincount(np.array(sorted(edges)).ravel())


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_icosphere_has_twelve_points_of_five_neighbours_and_the_rest_six(level):
    points = icosphere(level, dtype=torch.float64)
    assert points.shape == (10 * 4**level + 2, 3)
    np.testing.assert_allclose(points.norm(dim=1), 1, atol=1e-15)
    counts = neighbour_counts(points.numpy())
    assert np.count_nonzero(counts == 5) == 12
    assert np.count_nonzero(counts == 6) == len(points) - 12
    distances = torch.cdist(points, points).fill_diagonal_(9).min(dim=1).values
    assert distances.max() / distances.min() < 1.2


def test_icosphere_is_nested_and_stands_on_its_poles():
    coarse, fine = icosphere(2), icosphere(3)
    assert torch.equal(fine[: len(coarse)], coarse)
    assert torch.equal(icosphere(0)[[0, 11]], torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]))


def test_icosahedron_edges_have_their_known_angle():
    points = icosphere(0, dtype=torch.float64)
    cosine = (points @ points.T).fill_diagonal_(-1).max(dim=1).values
    np.testing.assert_allclose(cosine, 1 / math.sqrt(5), atol=1e-15)


def test_fibonacci_points_share_the_sphere_evenly():
    points = fibonacci_sphere(1000, dtype=torch.float64).numpy()
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-15)
    np.testing.assert_allclose(points[:, 2], 1 - (2 * np.arange(1000) + 1) / 1000, atol=1e-15)
    turn = np.diff(np.unwrap(np.arctan2(points[:, 1], points[:, 0])))
    np.testing.assert_allclose(turn % (2 * np.pi), np.pi * (3 - np.sqrt(5)), atol=1e-9)
    spacing = torch.cdist(torch.tensor(points), torch.tensor(points)).fill_diagonal_(9).min(dim=1).values
    assert spacing.min() > 0.8 * math.sqrt(4 * math.pi / 1000)


def test_samplings_repeat_bit_for_bit_in_both_precisions():
    for sample in (lambda **k: fibonacci_sphere(501, **k), lambda **k: icosphere(3, **k)):
        assert torch.equal(sample(), sample())
        assert torch.equal(sample(dtype=torch.float64).float(), sample())


@pytest.mark.parametrize("count", [1, 5, 9])
@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_nearest_points_equal_brute_force_on_even_and_crowded_sets(count, spread):
    random = np.random.default_rng(count)
    points = random.normal(size=(700, 3)) * [1, 1, spread] + [0, 0, 1 - spread]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    targets = random.normal(size=(900, 3))
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    expected = np.argsort(np.linalg.norm(targets[:, None] - points[None], axis=2), axis=1)[:, :count]
    np.testing.assert_array_equal(nearest_points(torch.tensor(points), torch.tensor(targets), count), expected)


@pytest.mark.parametrize("name", ["fibonacci", "icosphere", "rings", "random"])
def test_triangles_are_those_of_the_convex_hull(name):
    random = np.random.default_rng(0)
    points = {
        "fibonacci": fibonacci_sphere(400, dtype=torch.float64),
        "icosphere": icosphere(2, dtype=torch.float64) @ torch.tensor(random_rotation(1)),
        "rings": latitude_rings(16, dtype=torch.float64),
        "random": torch.tensor(random.normal(size=(300, 3))),
    }[name]
    points = SpherePoints(points).directions()
    targets = random.normal(size=(2000, 3))
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    index, weight = points_table(points, torch.tensor(targets), 3, 0.2)
    np.testing.assert_allclose(weight.sum(dim=1), 1, atol=1e-14)
    hull = ConvexHull(points.numpy())
    expected = np.zeros((len(targets), len(points)))
    for corners in hull.simplices:
        amounts = np.linalg.solve(points.numpy()[corners].T, targets.T)
        for t in np.flatnonzero((amounts > 0).all(axis=0)):
            expected[t, corners] = amounts[:, t] / amounts[:, t].sum()
    actual = np.zeros_like(expected)
    np.add.at(actual, (np.arange(len(targets))[:, None], index.numpy()), weight.numpy())
    if name == "random":
        # Long thin triangles reach beyond the candidates: another triangle around the target answers, linear too.
        read = (actual @ points.numpy()) / np.linalg.norm(actual @ points.numpy(), axis=1, keepdims=True)
        np.testing.assert_allclose(read, targets, atol=1e-9)
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_outside_all_triangles_the_nearest_point_answers():
    cap = fibonacci_sphere(400, dtype=torch.float64)[:60]
    index, weight = points_table(cap, -cap[:5], 3, 0.2)
    assert torch.equal(weight, torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(5, 3))
    assert torch.equal(index[:, 0], torch.cdist(-cap[:5], cap).argmin(dim=1))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="1 or more, got 0"):
        fibonacci_sphere(0)
    with pytest.raises(ValueError, match=r"level in 0\.\.9, got 12"):
        icosphere(12)
    with pytest.raises(ValueError, match=r"\(N, 3\) with N of 4 or more, got \(3, 3\)"):
        SpherePoints(torch.eye(3))
    with pytest.raises(ValueError, match="finite and not zero"):
        SpherePoints(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="between 1 and the number of points, 4, got 5"):
        points_table(icosphere(0, dtype=torch.float64)[:4], icosphere(0, dtype=torch.float64), 5, 0.2)
