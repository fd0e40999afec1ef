"""One room from its seed: draw the scene, cast the rays, shade, photograph."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.rendering.camera import cover_tripod, develop, draw_photography, expose, smooth_outlines
from lightning_plugins.engines.rendering.distribution import TRAINING_ROOMS, RoomDistribution
from lightning_plugins.engines.rendering.noise import noise
from lightning_plugins.engines.rendering.raycast import cast, pixel_directions, rotated, turn
from lightning_plugins.engines.rendering.sampling import draw_scene
from lightning_plugins.engines.rendering.scene import Scene
from lightning_plugins.engines.rendering.shading import add_highlights, irradiance
from lightning_plugins.engines.rendering.surfaces import colours, materials_of_pixels, surface_table

# Independent streams of random numbers for one seed, so that tilt and resolution leave the scene alone.
SCENE_STREAM, TILT_STREAM, SENSOR_STREAM, PHOTOGRAPHY_STREAM = range(4)


@dataclass(frozen=True)
class RenderedRoom:
    """A photograph of a room and what is true about it.

    Attributes:
        image: ``(H, W, 3)`` uint8, sRGB.
        depth_m: ``(H, W)`` float32, distance along the ray in metres; finite and positive everywhere.
        mask: ``(H, W)`` bool, false where a depth sensor would have given nothing.
        camera_to_level: ``(3, 3)`` float64 rotation from the camera's frame to the levelled one; identity without tilt.
        seed: what it was drawn from.
        shape: one of ``SHAPES``.
    """

    image: npt.NDArray[np.uint8]
    depth_m: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    camera_to_level: npt.NDArray[np.float64]
    seed: int
    shape: str

    @property
    def up(self) -> npt.NDArray[np.float64]:
        """The true vertical in the camera's frame: a unit vector."""
        return self.camera_to_level[2].copy()


def stream(seed: int, number: int) -> np.random.Generator:
    """Return the generator of one of a seed's streams."""
    return np.random.Generator(np.random.PCG64([seed, number]))


def tilt_rotation(cosine: float, azimuth_rad: float) -> npt.NDArray[np.float64]:
    """Return the smallest camera-to-level rotation that leans the camera's vertical towards an azimuth of the level frame.

    Args:
        cosine: of the angle between the camera's vertical and the true one.
        azimuth_rad: counter-clockwise from forward, seen from above.
    """
    sine = np.sqrt(max(0.0, 1.0 - cosine * cosine))
    x, y = -np.sin(azimuth_rad), np.cos(azimuth_rad)
    cross = np.array([[0.0, 0.0, y], [0.0, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + sine * cross + (1.0 - cosine) * (cross @ cross)


def draw_tilt(generator: np.random.Generator, max_tilt_deg: float) -> npt.NDArray[np.float64]:
    """Return a camera-to-level rotation whose tilt is even over the cone of ``max_tilt_deg``.

    It is the smallest rotation that carries the camera's vertical to the true one: tilts have no yaw of their own.
    """
    cosine = 1.0 - generator.random() * (1.0 - np.cos(np.radians(max_tilt_deg)))
    azimuth = generator.uniform(0.0, 2.0 * np.pi)
    return np.eye(3) if max_tilt_deg == 0.0 else tilt_rotation(cosine, azimuth)


def room_scene(seed: int, distribution: RoomDistribution = TRAINING_ROOMS) -> Scene:
    """Return the scene of a seed, the same for every image size and tilt."""
    return draw_scene(stream(seed, SCENE_STREAM), distribution)


def render_room(
    seed: int,
    height: int,
    width: int,
    distribution: RoomDistribution = TRAINING_ROOMS,
    camera_to_level: npt.NDArray[np.float64] | None = None,
) -> RenderedRoom:
    """Render the room of a seed.

    Args:
        seed: 0 or more; the same seed gives the same bytes, and the same room at every size.
        height: rows, 16 or more.
        width: columns, twice ``height``.
        distribution: what rooms there are.
        camera_to_level: ``(3, 3)`` rotation, how the camera is tilted; drawn from the distribution if left out.

    Raises:
        InputError: if the seed is negative or the size is not 2:1.
    """
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if height < 16 or width != 2 * height:
        raise InputError(f"an equirectangular image is twice as wide as high and 16 rows or more, got {height} x {width}")
    scene = room_scene(seed, distribution)
    photography = draw_photography(stream(seed, PHOTOGRAPHY_STREAM))
    if camera_to_level is None:
        camera_to_level = draw_tilt(stream(seed, TILT_STREAM), distribution.max_tilt_deg)
    room_from_camera = turn(-scene.yaw_rad) @ camera_to_level
    to_camera = room_from_camera.T
    rays = rotated(room_from_camera, pixel_directions(height, width))
    inverse, surface = cast(scene, rays, to_camera)
    depth = 1.0 / inverse

    points = rays * depth
    for axis in range(3):
        points[axis] += scene.camera_m[axis]
    table = surface_table(scene)
    material = materials_of_pixels(scene, table, surface, points, to_camera)
    albedo, gloss, emission = colours(scene, table, surface, material, points, depth * np.float32(np.pi / height))
    normals = table.normal.take(surface, axis=1)
    light = albedo * irradiance(scene, surface, points, normals, to_camera)
    add_highlights(scene, light, gloss, points, normals, rays)
    light += albedo * emission
    expose(light, photography)
    smooth_outlines(light, surface.astype(np.int32) * 4096 + material, photography.softness)
    covered = cover_tripod(light, -rays[2], rays[:2], photography)
    image = develop(light, photography, stream(seed, SENSOR_STREAM))

    mask = depth < photography.range_m
    mask &= ~covered
    unmeasured = np.zeros(table.material.size, dtype=bool)
    unmeasured[list(scene.unmeasured)] = True
    mask &= ~unmeasured.take(surface)
    if photography.dropout:
        patches = noise("cloud", points[0] + points[2], points[1] - points[2], depth * 0.01, 0.02)
        mask &= (patches < 1.3) | (image.max(axis=2) > 60)
    return RenderedRoom(image, depth, mask, camera_to_level, seed, scene.shape)
