"""Depth against triangles in float64, against closed forms, and under tilt."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_plugins.engines import sphere
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, SHAPES, TRAINING_ROOMS, RoomDistribution, render_room
from lightning_plugins.engines.rendering.raycast import cast, pixel_directions, windows
from lightning_plugins.engines.rendering.render import draw_tilt, room_scene, stream
from lightning_plugins.engines.rendering.scene import Box, Plane, Scene
from tests.engines.rendering.triangle_oracle import directions, oracle_depth, yaw_matrix

HEIGHT, WIDTH = 24, 48


def of_shape(shape, **changes):
    base = HELD_OUT_ROOMS if shape.startswith("sloped") else TRAINING_ROOMS
    return replace(base, shapes=(shape,), **changes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_depth_equals_the_triangles(shape, seed):
    distribution = of_shape(shape)
    scene = room_scene(seed, distribution)
    expected = oracle_depth(scene, directions(HEIGHT, WIDTH) @ yaw_matrix(-scene.yaw_rad).T).reshape(HEIGHT, WIDTH)
    np.testing.assert_allclose(render_room(seed, HEIGHT, WIDTH, distribution).depth_m, expected, rtol=2e-5)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_a_tilted_camera_sees_the_level_room_turned(seed):
    distribution = of_shape("sloped_l_shaped", max_tilt_deg=180.0)
    room = render_room(seed, HEIGHT, WIDTH, distribution)
    scene = room_scene(seed, distribution)
    assert scene == room_scene(seed, of_shape("sloped_l_shaped")), "tilt must not change the scene"
    level = directions(HEIGHT, WIDTH) @ room.camera_to_level.T
    expected = oracle_depth(scene, level @ yaw_matrix(-scene.yaw_rad).T).reshape(HEIGHT, WIDTH)
    np.testing.assert_allclose(room.depth_m, expected, rtol=2e-5)
    np.testing.assert_allclose(room.camera_to_level @ room.up, [0, 0, 1], atol=1e-12)


def shell(length, width, height, camera, solids=()):
    """An empty box room, written by hand."""
    x, y, up = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    planes = (
        Plane((0.0, 0.0, -1.0), 0.0, x, y, 0),
        Plane((-1.0, 0.0, 0.0), 0.0, y, up, 0),
        Plane((1.0, 0.0, 0.0), length, y, up, 0),
        Plane((0.0, -1.0, 0.0), 0.0, x, up, 0),
        Plane((0.0, 1.0, 0.0), width, x, up, 0),
        Plane(up, height, x, y, 0),
    )
    return Scene("box", planes, tuple(solids), (), (), (), (), None, 0, 1.0, camera, 0.0, (0.1, 0.1, 0.1), (), ())


def depth_of(scene, height, width):
    inverse, surface = cast(scene, pixel_directions(height, width), np.eye(3))
    return 1.0 / inverse, surface


def test_an_empty_room_in_closed_form():
    depth, surface = depth_of(shell(5.0, 4.0, 2.5, (2.0, 1.0, 1.5)), 32, 64)
    rays = directions(32, 64)
    to_walls = np.where(rays > 0, np.array([3.0, 3.0, 1.0]), np.array([2.0, 1.0, 1.5])) / np.abs(rays)
    np.testing.assert_allclose(depth.ravel(), to_walls.min(axis=1), rtol=2e-6)
    # Forward is +x (surface 2), the left half of the image looks to +y (surface 4), the right half to -y (surface 3).
    assert (surface[15, 31], surface[15, 16], surface[15, 47], surface[0, 0], surface[-1, 0]) == (2, 4, 3, 5, 0)


def test_a_box_across_the_seam_and_one_over_the_pole():
    behind = Box((0.5, 2.0, 1.5), (0.25, 0.5, 0.5), 0.0, (0,) * 6)
    above = Box((2.0, 2.0, 2.4), (0.5, 0.5, 0.1), 0.3, (0,) * 6)
    depth, surface = depth_of(shell(4.0, 4.0, 2.5, (2.0, 2.0, 1.5), (behind, above)), 64, 128)
    backwards = -directions(64, 128).reshape(64, 128, 3)[31, [0, 127], 0]
    np.testing.assert_allclose(depth[31, [0, 127]], 1.25 / backwards, rtol=2e-6)
    np.testing.assert_allclose(depth[0], 0.8 / np.cos(np.pi * 0.5 / 64), rtol=2e-6)
    assert set(surface[0].tolist()) == {6 + 6 + 4}


def test_windows_hold_every_pixel_that_sees_a_box():
    generator = np.random.default_rng(0)
    for _ in range(60):
        centre = generator.normal(size=3) * 2.0
        half = generator.uniform(0.02, 0.6, 3)
        if np.all(np.abs(centre) < half + 0.3):
            continue
        scene = shell(40.0, 40.0, 40.0, (20.0, 20.0, 20.0), [Box(tuple(centre + 20.0), tuple(half), 0.7, (0,) * 6)])
        _, surface = depth_of(scene, 40, 80)
        rays = directions(40, 80)
        # Hit or not, by the slab test in the box's own frame in float64.
        local_rays, origin = rays @ yaw_matrix(0.7), -centre @ yaw_matrix(0.7)
        first, second = (-half - origin) / local_rays, (half - origin) / local_rays
        enter, leave = np.minimum(first, second).max(axis=1), np.maximum(first, second).min(axis=1)
        np.testing.assert_array_equal((surface >= 6).ravel(), (enter < leave) & (enter > 0))


def test_windows_of_wide_sets_are_the_whole_image():
    around = np.array([[(1.0, 0.0, 0.1), (-1.0, 0.1, 0.1), (0.0, 1.0, -0.1), (0.0, -1.0, 0.0)]])
    assert windows(around, 16, 32) == [[(slice(0, 16), slice(0, 32))]]


@pytest.mark.parametrize("distribution", [TRAINING_ROOMS, HELD_OUT_ROOMS])
def test_below_the_camera_is_the_floor(distribution):
    for seed in range(12):
        camera_height = room_scene(seed, distribution).camera_m[2]
        depth = render_room(seed, 64, 128, distribution).depth_m
        np.testing.assert_allclose(depth[-1], camera_height / np.cos(np.pi * 0.5 / 64), rtol=1e-5)
        assert 1.4 <= camera_height <= 1.65


@pytest.mark.parametrize("distribution", [TRAINING_ROOMS, HELD_OUT_ROOMS])
def test_depths_stay_between_clearance_and_limit(distribution: RoomDistribution):
    for seed in range(60):
        depth = render_room(seed, 16, 32, distribution).depth_m
        assert depth.dtype == np.float32
        # A ceiling lamp's middle is 0.8 m away, its end may be nearer; all else keeps its distance (test_clearance.py).
        assert depth.min() >= 0.4
        assert depth[8:].min() >= 0.8
        assert depth.max() < 25.0


def test_pixel_directions_are_those_of_the_sphere():
    """Written in numpy here, so that rooms need no torch; the convention is one."""
    np.testing.assert_array_equal(pixel_directions(24, 48), sphere.pixel_directions(24, 48).permute(2, 0, 1).numpy())


def test_tilts_are_even_over_the_cone():
    ups = np.array([draw_tilt(stream(seed, 1), 60.0)[2] for seed in range(2000)])
    cosines = np.sort(ups[:, 2])
    # Even by solid angle: the cosine is uniform between cos 60 deg and 1. 1.95 / sqrt(n) is Kolmogorov's bound for 1 in 1000.
    uniform = (np.arange(2000) + 0.5) / 2000
    assert np.abs((cosines - 0.5) / 0.5 - uniform).max() < 1.95 / np.sqrt(2000)
    assert np.abs(ups[:, :2].mean(axis=0)).max() < 0.05
    rotation = draw_tilt(stream(3, 1), 60.0)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-14)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_array_equal(draw_tilt(stream(3, 1), 0.0), np.eye(3))
