"""Light and camera against closed forms: falloff, shadows, sun patches, corners, textures, noise, tone, tripod."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_plugins.engines.rendering.camera import (
    CURVE_ENTRIES,
    CURVE_TOP,
    Photography,
    cover_tripod,
    develop,
    expose,
    smooth_outlines,
    tone_curve,
)
from lightning_plugins.engines.rendering.noise import NOISES, noise, noise_tile
from lightning_plugins.engines.rendering.scene import Box, Lamp, Material, Opening, Sun
from lightning_plugins.engines.rendering.shading import SHADOW_BIAS_M, lamp_light, occlusion, shadow_map, sun_light
from lightning_plugins.engines.rendering.textures import TEXTURES
from tests.engines.rendering.test_raycast import depth_of, shell
from tests.engines.rendering.triangle_oracle import directions

PLAIN_PHOTOGRAPHY = Photography(0.3, (1.0, 1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, "none", 0.2, (0.5, 0.5, 0.5), 100.0, 0.0)


def floor_points(count=25, size=4.0):
    """A square lattice of points on the floor, ``(3, count, count)``, and their normals."""
    line = np.linspace(0.1, size - 0.1, count, dtype=np.float32)
    x, y = np.meshgrid(line, line, indexing="ij")
    points = np.stack([x, y, np.zeros_like(x)])
    normals = np.zeros_like(points)
    normals[2] = 1.0
    return points, normals


def test_lamps_follow_the_cosine_and_the_square_of_the_distance():
    points, normals = floor_points()
    light = lamp_light(Lamp((2.0, 2.0, 2.5), (1.0, 1.0, 1.0), 0.4), points, normals, None)
    squared = (points[0].astype(float) - 2.0) ** 2 + (points[1].astype(float) - 2.0) ** 2 + 2.5**2
    expected = (2.5 / np.sqrt(squared) + 0.15) / 1.15 / (squared + (0.3 + 0.4**2) / 1.15)
    np.testing.assert_allclose(light, expected, rtol=1e-5)


def test_windows_shine_to_one_side():
    points, normals = floor_points()
    light = lamp_light(Lamp((2.0, 2.0, 1.5), (1.0, 1.0, 1.0), 0.5, axis=(1.0, 0.0, 0.0)), points, normals, None)
    assert (light[points[0] < 1.99] == 0.0).all()
    assert (light[points[0] > 2.01] > 0.0).all()


def test_a_box_throws_the_shadow_that_geometry_says():
    points, normals = floor_points(81)
    lamp = Lamp((2.0, 2.0, 2.5), (1.0, 1.0, 1.0), 0.1)
    box = Box((2.3, 2.4, 1.0), (0.4, 0.5, 0.1), 0.0, (0,) * 6)
    lit = lamp_light(lamp, points, normals, None)
    share = lamp_light(lamp, points, normals, shadow_map((box,), lamp.position_m)) / lit
    # Through the box: the segment from lamp to point crosses the slab 0.9..1.1 m inside the box's outline, in float64.
    steps = (2.5 - np.linspace(0.9, 1.1, 9)) / 2.5
    crossings = [np.stack([2.0 + (points[k].astype(float) - 2.0) * s for k in range(2)]) for s in steps]
    inside = [(np.abs(c[0] - 2.3) < 0.4) & (np.abs(c[1] - 2.4) < 0.5) for c in crossings]
    shadow = np.any(inside, axis=0)
    assert share[shadow].mean() < 0.1
    assert share[~shadow].mean() > 0.95
    # Half-way values are confined to the edge: a shadow map cell on the floor.
    assert ((share > 0.01) & (share < 0.99)).mean() < 0.12
    assert SHADOW_BIAS_M < 0.1


def test_the_sun_patch_is_the_window_projected_on_the_floor():
    points, normals = floor_points(81)
    window = Opening(2, Box((4.1, 2.0, 1.5), (0.1, 0.6, 0.5), 0.0, (0,) * 6), 0)
    scene = replace(shell(4.0, 4.0, 2.5, (1.0, 1.0, 1.5)), openings=(window,))
    sun = Sun((0.8, 0.0, 0.6), 0, (1.0, 1.0, 1.0))
    light = sun_light(scene, sun, points, normals)
    height = (4.2 - points[0].astype(float)) * 0.75
    across = np.abs(points[1].astype(float) - 2.0)
    inside = (np.abs(height - 1.5) < 0.47) & (across < 0.57) & (across > 0.03)
    near_edge = (np.abs(np.abs(height - 1.5) - 0.47) < 1e-4) | (np.abs(across - 0.57) < 1e-4) | (np.abs(across - 0.03) < 1e-4)
    np.testing.assert_allclose(light[~near_edge], np.where(inside, 0.6, 0.0)[~near_edge], atol=1e-6)


def test_corners_are_darker_than_the_middle_and_contact_darkest():
    box = Box((2.0, 1.0, 0.3), (0.3, 0.3, 0.3), 0.0, (0,) * 6)
    scene = shell(4.0, 4.0, 2.5, (2.0, 2.0, 1.5), (box,))
    depth, surface = depth_of(scene, 64, 128)
    rays = directions(64, 128).T.reshape(3, 64, 128).astype(np.float32)
    points = rays * depth + np.array(scene.camera_m, dtype=np.float32)[:, None, None]
    normals = np.zeros_like(points)
    for number, plane in enumerate(scene.planes):
        normals[:, surface == number] = -np.array(plane.normal, dtype=np.float32)[:, None]
    share = occlusion(scene, surface, points, normals, np.eye(3))
    floor = surface == 0
    to_wall = np.minimum(np.minimum(points[0], 4 - points[0]), np.minimum(points[1], 4 - points[1]))
    beside = np.maximum(np.abs(points[0] - 2.0), np.abs(points[1] - 1.0)) - 0.3
    middle = share[floor & (to_wall > 1.2) & (beside > 0.5)].mean()
    assert share[floor & (to_wall < 0.1)].mean() < 0.93 * middle
    assert share[floor & (beside < 0.05)].mean() < 0.75 * middle
    assert (share > 0.2).all()
    assert (share <= 1.0).all()


@pytest.mark.parametrize("family", TEXTURES)
def test_textures_are_finite_bounded_and_fade_with_distance(family):
    generator = np.random.default_rng(0)
    u, v = (generator.uniform(-8, 8, 4000).astype(np.float32) for _ in range(2))
    material = Material(family, (0.5, 0.5, 0.5), (0.1, 0.1, 0.1), scale_m=1.0, contrast=0.5)
    near, far = (TEXTURES[family](u, v, np.full(4000, size, np.float32), material) for size in (0.01, 3.0))
    for mix, shade in (near, far):
        assert mix.shape == shade.shape == u.shape
        assert mix.dtype == shade.dtype == np.float32
        assert np.abs(mix).max() < 4.0
        assert shade.min() > -0.5
        assert shade.max() < 3.0
    if family not in ("flat", "outdoors"):  # an even colour, and a sky above a horizon, look the same from afar
        assert far[0].std() + far[1].std() < 0.6 * (near[0].std() + near[1].std())


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_mean_0_and_deviation_1_and_evens_out(name):
    tile = noise_tile(name)[: 256 * 256]
    assert abs(tile.mean()) < 1e-4
    assert tile.std() == pytest.approx(1.0, abs=1e-3)
    u = np.linspace(0.0, 50.0, 5000, dtype=np.float32)
    deviations = [noise(name, u, 0.7 * u, np.full(5000, size, np.float32), 0.02).std() for size in (0.01, 0.16, 1.0, 100.0)]
    assert deviations[0] > deviations[1] > deviations[2] > deviations[3]


def test_noise_of_the_sensor_grows_with_the_root_of_the_light():
    photography = replace(PLAIN_PHOTOGRAPHY, noise=0.02)
    deviations = []
    for level in (0.1, 0.4):
        image = develop(np.full((3, 100, 200), level, np.float32), photography, np.random.default_rng(1)) / 255.0
        linear = ((image + 0.055) / 1.055) ** 2.4  # the sRGB standard's curve, inverted
        deviations.append(linear.std())
        assert linear.mean() == pytest.approx(level, rel=0.02)
    # d(light) = 2 sqrt(light) d(root): four times the light, twice the noise.
    assert deviations[1] / deviations[0] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("shoulder", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("contrast", [0.0, 0.5])
def test_tone_curves_rise_from_black_to_white(shoulder, contrast):
    curve = tone_curve(replace(PLAIN_PHOTOGRAPHY, shoulder=shoulder, contrast=contrast)).astype(int)
    assert curve[0] == 0
    assert curve[-1] == 255
    assert (np.diff(curve) >= 0).all()
    assert curve.size == CURVE_ENTRIES
    assert CURVE_TOP > 1.0


def test_exposure_does_not_depend_on_the_lamps_strength():
    generator = np.random.default_rng(2)
    light = generator.uniform(0.5, 2.0, (3, 32, 64)).astype(np.float32)
    images = [develop(expose(scale * light, PLAIN_PHOTOGRAPHY), PLAIN_PHOTOGRAPHY, generator).mean() for scale in (1.0, 100.0)]
    assert images[1] == pytest.approx(images[0], rel=0.08)


def test_outlines_are_blended_across_the_seam_and_nothing_else_is():
    light = np.zeros((3, 8, 16), np.float32)
    light[:, :, 8:] = 1.0
    labels = np.zeros((8, 16), np.int32)
    labels[:, 8:] = 1
    smooth_outlines(light, labels, 0.0)
    expected = np.zeros(16)
    expected[8:] = 1.0
    expected[[7, 0]], expected[[8, 15]] = 0.25, 0.75
    np.testing.assert_allclose(light[1], np.tile(expected, (8, 1)), atol=1e-6)


@pytest.mark.parametrize("kind", ["disc", "blur", "ring", "legs"])
def test_the_tripod_covers_a_cap_around_the_nadir(kind):
    rays = directions(64, 128).T.reshape(3, 64, 128).astype(np.float32)
    light = np.random.default_rng(3).uniform(0.0, 1.0, (3, 64, 128)).astype(np.float32)
    before = light.copy()
    covered = cover_tripod(light, -rays[2], rays[:2], replace(PLAIN_PHOTOGRAPHY, tripod=kind))
    cap = -rays[2] > np.cos(0.2)
    assert covered[-1].all()
    assert not covered[~cap].any()
    assert (covered == cap).all() == (kind != "legs")
    np.testing.assert_array_equal(light[:, ~covered], before[:, ~covered])
    assert (light[:, covered] != before[:, covered]).any(axis=0).all()
