"""The openings of a room: its stretches of wall, and the doors, windows and curtains in them."""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_plugins.engines.rendering.layout import ACCENT, WALL, Layout
from lightning_plugins.engines.rendering.palette import draw_colour
from lightning_plugins.engines.rendering.scene import Box, Colour, Decal, Lamp, Material, Opening, Vector

WHITE: Colour = (0.85, 0.85, 0.85)
BLACK: Colour = (0.03, 0.03, 0.03)


@dataclass(frozen=True)
class Segment:
    """A stretch of wall that faces the room: along ``axis`` 0 (x) or 1 (y) at the coordinate ``at_m`` of the other axis."""

    surface: int
    axis: int
    at_m: float
    outward: float
    low_m: float
    high_m: float
    shell: bool


@dataclass
class Decoration:
    """What has been put up so far.

    Attributes:
        windows: numbers of the openings that are windows.
        blind: whether their panes give a depth sensor nothing.
        taken: stretches of wall that are no longer free: surface, from, to.
    """

    materials: list[Material]
    solids: list[Box] = field(default_factory=list)
    openings: list[Opening] = field(default_factory=list)
    decals: list[Decal] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    blind: bool = False
    taken: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, material: Material) -> int:
        """Add a material and return its number."""
        self.materials.append(material)
        return len(self.materials) - 1


def flat(colour: Colour, emission: float = 0.0) -> Material:
    """Return an even material."""
    return Material("flat", colour, colour, emission=emission)


def segments(layout: Layout) -> list[Segment]:
    """Return the stretches of wall that face the room, those of the missing corner included."""
    size = layout.size_m
    found = []
    notch = layout.notch
    for surface, (other, outward) in enumerate(((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0)), start=1):
        axis = 1 - other
        low, high = 0.0, size[axis]
        at = size[other] if outward > 0 else 0.0
        if notch is not None and abs(notch.centre_m[other] - at) <= notch.half_m[other] + 1e-9:
            if notch.centre_m[axis] < size[axis] / 2:
                low = 2 * notch.half_m[axis]
            else:
                high = size[axis] - 2 * notch.half_m[axis]
        found.append(Segment(surface, axis, at, outward, low, high, True))
    if notch is not None:
        first = len(layout.planes)
        for other in range(2):
            axis = 1 - other
            at_low = notch.centre_m[other] < size[other] / 2
            # The face that looks into the room: +x of a notch at x = 0. Out of the room is into the notch.
            face = first + 2 * other + (1 if at_low else 0)
            at = notch.centre_m[other] + (notch.half_m[other] if at_low else -notch.half_m[other])
            low, high = notch.centre_m[axis] - notch.half_m[axis], notch.centre_m[axis] + notch.half_m[axis]
            found.append(Segment(face, axis, at, -1.0 if at_low else 1.0, low, high, False))
    return found


def wall_height_m(layout: Layout, segment: Segment, low_m: float, high_m: float) -> float:
    """Return the least height of the ceiling along a piece of wall (it is a concave function, so least at an end)."""
    ends = [(u, segment.at_m) if segment.axis == 0 else (segment.at_m, u) for u in (low_m, high_m)]
    return min(layout.ceiling_height_m(x, y) for x, y in ends)


def free_interval(
    done: Decoration, segment: Segment, where: float, wide_m: float, gap_m: float = 0.08
) -> tuple[float, float] | None:
    """Return a free interval of a wall at the share ``where`` of its length, and mark it taken; None if there is none."""
    room = segment.high_m - segment.low_m - 2 * gap_m - wide_m
    if room < 0.0:
        return None
    low = segment.low_m + gap_m + where * room
    high = low + wide_m
    if any(surface == segment.surface and low < b + gap_m and a - gap_m < high for surface, a, b in done.taken):
        return None
    done.taken.append((segment.surface, low, high))
    return low, high


def _opening(segment: Segment, u: tuple[float, float], z: tuple[float, float], deep_m: float, side: int, back: int) -> Opening:
    """Return the box behind a wall; its far face has the material ``back``."""
    along, across = (u[0] + u[1]) / 2, segment.at_m + segment.outward * deep_m / 2
    centre = (along, across) if segment.axis == 0 else (across, along)
    half = ((u[1] - u[0]) / 2, deep_m / 2) if segment.axis == 0 else (deep_m / 2, (u[1] - u[0]) / 2)
    front = 2 * (1 - segment.axis) + (0 if segment.outward > 0 else 1)
    faces = [side] * 6
    faces[front ^ 1] = back
    box = Box((*centre, (z[0] + z[1]) / 2), (*half, (z[1] - z[0]) / 2), 0.0, (*faces,))  # type: ignore[arg-type]
    return Opening(segment.surface, box, front)


def _frame(
    done: Decoration, segment: Segment, u: tuple[float, float], z: tuple[float, float], wide_m: float, material: int
) -> None:
    outer = (u[0] - wide_m, u[1] + wide_m)
    done.decals.append(Decal(segment.surface, outer, (max(z[0] - wide_m, 0.0), z[1] + wide_m), material))


def put_doors(generator: np.random.Generator, layout: Layout, walls: list[Segment], done: Decoration) -> None:
    """Put in one or two doors: shut and slightly recessed, or open to a dim passage."""
    for _ in range(1 if generator.random() < 0.65 else 2):
        segment = walls[int(generator.integers(len(walls)))]
        draw = generator.random(6).tolist()
        wide, high = 0.75 + 0.2 * draw[0], 1.95 + 0.15 * draw[1]
        place = free_interval(done, segment, draw[2], wide, 0.15)
        if place is None or wall_height_m(layout, segment, *place) < high + 0.12:
            continue
        colour = WHITE if draw[3] < 0.4 else draw_colour(generator, "furniture", "grain")
        frame = done.add(flat(WHITE if draw[4] < 0.5 else colour))
        _frame(done, segment, place, (0.0, high), 0.07, frame)
        if draw[5] < 0.3 and segment.shell and not layout.hall:
            wall = done.add(replace(done.materials[WALL], origin_m=(0.0, 0.0)))
            done.openings.append(_opening(segment, place, (0.0, high), 0.8 + 1.6 * draw[0], wall, wall))
        else:
            second = tuple(0.8 * c for c in colour)
            leaf = done.add(Material("door", colour, second, scale_m=wide, gloss=0.03, origin_m=(place[0], 0.0)))  # type: ignore[arg-type]
            done.openings.append(_opening(segment, place, (0.0, high), 0.02 + 0.1 * draw[1], frame, leaf))


def put_windows(generator: np.random.Generator, layout: Layout, walls: list[Segment], done: Decoration, day: float) -> None:
    """Put in windows, each with its light; in half of the rooms their panes give a depth sensor nothing.

    Args:
        day: brightness outside.
    """
    done.blind = bool(generator.random() < 0.5)
    sky: Colour = (0.75, 0.82, 0.92)
    for _ in range(int(generator.integers(0, 5))):
        segment = walls[int(generator.integers(len(walls)))]
        draw = generator.random(9).tolist()
        wide = 0.6 + 1.9 * draw[0] ** 1.5
        sill = 0.05 if draw[1] < 0.2 else 0.6 + 0.5 * draw[2]
        place = free_interval(done, segment, draw[3], wide, 0.2)
        if place is None or not segment.shell:
            continue
        top = min(wall_height_m(layout, segment, *place) - 0.15, 1.9 + 0.5 * draw[4])
        if top < sill + 0.5:
            continue
        grey = 0.25 + 0.3 * draw[5]
        ground: Colour = (grey, grey * (1.0 + 0.2 * draw[6]), grey * (0.65 + 0.35 * draw[2]))
        pane = done.add(
            Material("outdoors", sky, ground, scale_m=wide / (1 + int(3 * draw[5])) + 1e-4, contrast=draw[6], emission=2.2 * day,
                     origin_m=(place[0], sill))
        )  # fmt: skip
        frame = done.add(flat(WHITE if draw[7] < 0.6 else BLACK))
        _frame(done, segment, place, (sill, top), 0.06, frame)
        done.openings.append(_opening(segment, place, (sill, top), 0.06 + 0.2 * draw[8], frame, pane))
        done.windows.append(len(done.openings) - 1)
        _window_light(layout, segment, done, place, (sill, top), day)
        if generator.random() < 0.35:
            _curtains(generator, segment, done, place, top)


def _window_light(
    layout: Layout, segment: Segment, done: Decoration, u: tuple[float, float], z: tuple[float, float], day: float
) -> None:
    area = (u[1] - u[0]) * (z[1] - z[0])
    inward = -segment.outward
    along, across, high = (u[0] + u[1]) / 2, segment.at_m + 0.05 * inward, (z[0] + z[1]) / 2
    position: Vector = (along, across, high) if segment.axis == 0 else (across, along, high)
    axis: Vector = (0.0, inward, 0.0) if segment.axis == 0 else (inward, 0.0, 0.0)
    strength = 1.1 * day * area
    done.lamps.append(Lamp(position, (0.92 * strength, 1.0 * strength, 1.12 * strength), math.sqrt(area) / 2, axis))


def _curtains(generator: np.random.Generator, segment: Segment, done: Decoration, u: tuple[float, float], top: float) -> None:
    material = done.add(replace(done.materials[ACCENT], colour=draw_colour(generator, "furniture")))
    across = segment.at_m - 0.05 * segment.outward
    for low, high in ((u[0] - 0.12, u[0] + 0.1), (u[1] - 0.1, u[1] + 0.12)):
        low, high = max(low, segment.low_m + 0.01), min(high, segment.high_m - 0.01)
        along, wide, tall = (low + high) / 2, (high - low) / 2, (top + 0.08) / 2
        if segment.axis == 0:
            done.solids.append(Box((along, across, tall), (wide, 0.035, tall), 0.0, (material,) * 6))
        else:
            done.solids.append(Box((across, along, tall), (0.035, wide, tall), 0.0, (material,) * 6))
