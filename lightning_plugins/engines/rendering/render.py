"""One room from its seed: draw the scene, cast the rays, shade, photograph."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.rendering.distribution import TRAINING_ROOMS, RoomDistribution
from lightning_plugins.engines.rendering.layout import draw_layout
from lightning_plugins.engines.rendering.raycast import cast, pixel_directions, rotated, turn
from lightning_plugins.engines.rendering.scene import Box, Scene

# Independent streams of random numbers for one seed, so that tilt and resolution leave the scene alone.
SCENE_STREAM, TILT_STREAM, SENSOR_STREAM = 0, 1, 2


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


def draw_tilt(generator: np.random.Generator, max_tilt_deg: float) -> npt.NDArray[np.float64]:
    """Return a camera-to-level rotation whose tilt is even over the cone of ``max_tilt_deg``.

    It is the smallest rotation that carries the camera's vertical to the true one: tilts have no yaw of their own.
    """
    cosine = 1.0 - generator.random() * (1.0 - np.cos(np.radians(max_tilt_deg)))
    azimuth = generator.uniform(0.0, 2.0 * np.pi)
    if max_tilt_deg == 0.0:
        return np.eye(3)
    sine = np.sqrt(max(0.0, 1.0 - cosine * cosine))
    x, y = -np.sin(azimuth), np.cos(azimuth)
    cross = np.array([[0.0, 0.0, y], [0.0, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + sine * cross + (1.0 - cosine) * (cross @ cross)


def draw_scene(seed: int, distribution: RoomDistribution) -> Scene:
    """Return the scene of a seed, the same for every image size and tilt."""
    generator = stream(seed, SCENE_STREAM)
    layout = draw_layout(generator, distribution)
    solids = [] if layout.notch is None else [layout.notch]
    for _ in range(int(generator.uniform(*distribution.furniture_per_square_metre) * layout.free_area_m2)):
        x, y = generator.random(2) * (np.array(layout.size_m[:2]) - 0.6) + 0.3
        if np.hypot(x - layout.camera_m[0], y - layout.camera_m[1]) > 1.1:
            half = generator.uniform(0.15, 0.5, 3)
            solids.append(Box((float(x), float(y), float(half[2])), tuple(half.tolist()), float(generator.uniform(0, 3)), (3,) * 6))
    return Scene(layout.shape, layout.planes, tuple(solids), (), (), (), (), None, len(solids), layout.free_area_m2,
                 layout.camera_m, layout.yaw_rad)


def render_room(seed: int, height: int, width: int, distribution: RoomDistribution = TRAINING_ROOMS) -> RenderedRoom:
    """Render the room of a seed.

    Args:
        seed: 0 or more; the same seed gives the same bytes, and the same room at every size.
        height: rows, 16 or more.
        width: columns, twice ``height``.
        distribution: what rooms there are.

    Raises:
        InputError: if the seed is negative or the size is not 2:1.
    """
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if height < 16 or width != 2 * height:
        raise InputError(f"an equirectangular image is twice as wide as high and 16 rows or more, got {height} x {width}")
    scene = draw_scene(seed, distribution)
    tilt = draw_tilt(stream(seed, TILT_STREAM), distribution.max_tilt_deg)
    room_from_camera = turn(-scene.yaw_rad) @ tilt
    rays = rotated(room_from_camera, pixel_directions(height, width))
    inverse, surface = cast(scene, rays, room_from_camera.T)
    tint = np.random.Generator(np.random.PCG64([seed, 3])).uniform(60, 220, (600, 3))
    light = 0.8 + 0.2 * (rays @ np.ones(1, np.float32) if False else rays[2])
    image = np.clip(tint[surface] * light[..., None], 0, 255).astype(np.uint8)
    depth = 1.0 / inverse
    return RenderedRoom(image, depth, np.ones(depth.shape, dtype=bool), tilt, seed, scene.shape)
