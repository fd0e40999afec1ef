"""The shell of a room and the camera in it: floor, walls, ceiling, the missing corner of an L, and a free spot to stand on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_plugins.engines.rendering.distribution import MIN_HEADROOM_M, WALL_MARGIN_M, RoomDistribution, arm_width_m
from lightning_plugins.engines.rendering.scene import Box, Plane, Vector

# Materials that every shell has, by number.
FLOOR, WALL, CEILING, BASEBOARD, ACCENT = range(5)

HALL_LENGTH_M, HALL_WIDTH_M, HALL_HEIGHT_M = (12.0, 20.0), (8.0, 12.0), (4.0, 6.0)
MIN_KNEE_M = 0.9  # height of the wall under a slope


@dataclass(frozen=True)
class Layout:
    """The shell, before anything stands in it.

    Attributes:
        notch: the missing corner of an L, a solid from floor to above the ceiling.
        size_m: length (x), width (y) and greatest height.
        ceiling: rows ``(gradient_x, gradient_y, height)``; the ceiling is the least of these planes.
        clearance_m: what the camera keeps from walls and furniture.
    """

    shape: str
    planes: tuple[Plane, ...]
    notch: Box | None
    size_m: Vector
    ceiling: npt.NDArray[np.float64]
    camera_m: Vector
    yaw_rad: float
    hall: bool
    clearance_m: float

    def ceiling_height_m(self, x: float, y: float) -> float:
        """Return the height of the ceiling above a point of the floor."""
        return min(gx * x + gy * y + h for gx, gy, h in self.ceiling.tolist())

    @property
    def free_area_m2(self) -> float:
        """Area of the floor."""
        taken = 0.0 if self.notch is None else 4.0 * self.notch.half_m[0] * self.notch.half_m[1]
        return self.size_m[0] * self.size_m[1] - taken


def draw_layout(generator: np.random.Generator, distribution: RoomDistribution) -> Layout:
    """Draw a shell and a place for the camera, clear of walls and ceiling."""
    shape = distribution.shapes[int(generator.integers(len(distribution.shapes)))]
    hall = bool(generator.random() < distribution.hall_share)
    ranges = (
        (HALL_LENGTH_M, HALL_WIDTH_M, HALL_HEIGHT_M)
        if hall
        else (distribution.length_m, distribution.width_m, distribution.height_m)
    )
    # Even in the logarithm: small rooms are as likely as large ones.
    length, width = (float(np.exp(generator.uniform(*np.log(pair)))) for pair in ranges[:2])
    length, width = max(length, width), min(length, width)
    low, high = ranges[2]
    height = float(low + (high - low) * generator.random() ** 1.7)
    camera_height = float(generator.uniform(*distribution.camera_height_m))
    if generator.random() < 0.5:
        length, width = width, length
    size = (length, width, height)
    margin = distribution.camera_clearance_m + WALL_MARGIN_M
    notch = _notch(generator, size, arm_width_m(distribution.camera_clearance_m)) if shape.endswith("l_shaped") else None
    slope = generator.random(5)
    share = 1.0
    while True:
        ceiling = _ceiling(slope, size, share) if shape.startswith("sloped") else np.array([[0.0, 0.0, height]])
        place = _place(generator, size, camera_height, ceiling, notch, margin)
        if place is not None:
            break
        share *= 0.7
    yaw = float(generator.uniform(0.0, 2.0 * np.pi))
    return Layout(
        shape, _planes(size, ceiling), notch, size, ceiling, (*place, camera_height), yaw, hall, distribution.camera_clearance_m
    )


def _notch(generator: np.random.Generator, size: Vector, strip_m: float) -> Box:
    """Return the missing corner of an L; both arms are at least ``strip_m`` wide, so that the camera has a place in each."""
    sides = []
    for axis in range(2):
        longest = size[axis] - strip_m
        part = float(generator.uniform(0.25, 0.6)) * size[axis]
        side = min(part, longest)
        sides.append((side / 2, side / 2 if generator.random() < 0.5 else size[axis] - side / 2))
    half = (sides[0][0], sides[1][0], size[2] / 2 + 0.1)
    return Box((sides[0][1], sides[1][1], half[2]), half, 0.0, (WALL,) * 6)


def _ceiling(draws: npt.NDArray[np.float64], size: Vector, share: float) -> npt.NDArray[np.float64]:
    """Return the planes of a shed (one slope), a gable (two) or an attic (one slope under a flat part)."""
    length, width, height = size
    kind, along, knee, ridge, flip = draws.tolist()
    run = width if along < 0.6 else length
    drop = share * (0.3 + 0.7 * knee) * (height - MIN_KNEE_M)
    if kind < 0.3:
        rows = [(-drop / run, height)]
    elif kind < 0.65:
        top = run * (0.35 + 0.3 * ridge)
        rows = [(drop / top, height - drop), (-drop / (run - top), height + drop * top / (run - top))]
    else:
        start = run * (0.3 + 0.5 * ridge)
        rows = [(0.0, height), (-drop / (run - start), height + drop * start / (run - start))]
    if flip < 0.5:
        rows = [(-g, g * run + h) for g, h in rows]
    return np.array([(0.0, g, h) if along < 0.6 else (g, 0.0, h) for g, h in rows])


def _place(
    generator: np.random.Generator,
    size: Vector,
    camera_height: float,
    ceiling: npt.NDArray[np.float64],
    notch: Box | None,
    margin: float,
) -> tuple[float, float] | None:
    """Return a point of the floor plan with clearance on all sides, or None if none of 64 drawn ones has it.

    Of the first three such points the one nearest to the middle of the room, where tripods stand more often than along walls.
    """
    points = generator.random((64, 2)) * (np.array(size[:2]) - 2 * margin) + margin
    slant = np.sqrt(1.0 + (ceiling[:, :2] ** 2).sum(axis=1))
    above = (points @ ceiling[:, :2].T + ceiling[:, 2] - camera_height) / slant
    free = (above >= MIN_HEADROOM_M).all(axis=1)
    if notch is not None:
        outside = np.abs(points - np.array(notch.centre_m[:2])) - np.array(notch.half_m[:2])
        free &= (outside >= margin).any(axis=1)
    found = points[free][:3]
    if not found.size:
        return None
    x, y = found[np.argmin(((found / np.array(size[:2]) - 0.5) ** 2).sum(axis=1))].tolist()
    return x, y


def _planes(size: Vector, ceiling: npt.NDArray[np.float64]) -> tuple[Plane, ...]:
    length, width, _ = size
    x, y, up = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    planes = [
        Plane((0.0, 0.0, -1.0), 0.0, x, y, FLOOR),
        Plane((-1.0, 0.0, 0.0), 0.0, y, up, WALL),
        Plane((1.0, 0.0, 0.0), length, y, up, WALL),
        Plane((0.0, -1.0, 0.0), 0.0, x, up, WALL),
        Plane((0.0, 1.0, 0.0), width, x, up, WALL),
    ]
    for gx, gy, h in ceiling.tolist():
        scale = float(np.sqrt(1.0 + gx * gx + gy * gy))
        normal = (-gx / scale, -gy / scale, 1.0 / scale)
        axes = (y, (1.0 / scale, 0.0, gx / scale)) if gx else (x, (0.0, 1.0 / scale, gy / scale))
        planes.append(Plane(normal, h / scale, *axes, CEILING))
    return tuple(planes)
