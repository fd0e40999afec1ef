"""Latitude rings: their symmetry, checked on the sets of points; their uniformity, against the spacing of equal cells."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from lightning_plugins.engines.sphere import latitude_rings


@pytest.mark.parametrize(("rows", "symmetry"), [(4, 1), (8, 4), (16, 8), (32, 3)])
def test_turning_by_the_symmetry_maps_the_points_onto_themselves(rows, symmetry):
    points = latitude_rings(rows, symmetry).double().numpy()
    angle = 2 * np.pi / symmetry
    turned = points @ np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    distance, partner = cKDTree(points).query(turned)
    assert distance.max() < 1e-6
    assert len(set(partner)) == len(points)


@pytest.mark.parametrize("rows", [8, 16, 32])
def test_is_near_uniform(rows):
    points = latitude_rings(rows, 4).double().numpy()
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-6)
    assert abs(len(points) / (4 * rows**2 / np.pi) - 1) < 0.1
    # No place of the sphere is farther than one spacing from a point, and no two points crowd.
    generator = np.random.default_rng(0)
    anywhere = generator.normal(size=(20000, 3))
    anywhere /= np.linalg.norm(anywhere, axis=1, keepdims=True)
    tree = cKDTree(points)
    assert tree.query(anywhere)[0].max() < np.pi / rows
    assert tree.query(points, k=2)[0][:, 1].min() > 0.5 * np.pi / rows


def test_refuses_no_rows():
    with pytest.raises(ValueError, match="rows and symmetry must be 1 or more, got 0 and 4"):
        latitude_rings(0, 4)
