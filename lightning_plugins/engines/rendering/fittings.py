"""What is fixed to walls, floor and ceiling of a room: pictures, rugs, skylights, beams, and the lamps and sun that light it."""

import math

import numpy as np

from lightning_plugins.engines.rendering.decoration import BLACK, WHITE, Decoration, Segment, flat, free_interval, wall_height_m
from lightning_plugins.engines.rendering.layout import ACCENT, Layout
from lightning_plugins.engines.rendering.palette import draw_colour, draw_light, draw_material
from lightning_plugins.engines.rendering.scene import Box, Decal, Lamp, Material, Sun

MIN_LAMP_DISTANCE_M = 0.8
TRIES = 8


def hang_pictures(generator: np.random.Generator, layout: Layout, walls: list[Segment], done: Decoration) -> None:
    """Hang pictures, boards and notices on the walls."""
    for _ in range(int(generator.integers(0, 7))):
        segment = walls[int(generator.integers(len(walls)))]
        draw = generator.random(9).tolist()
        wide, high = 0.15 + 1.2 * draw[0] ** 2, 0.15 + 0.7 * draw[1]
        place = free_interval(done, segment, draw[2], wide)
        low = 1.1 + 0.5 * draw[3]
        if place is None or wall_height_m(layout, segment, *place) < low + high + 0.15:
            continue
        rim = 0.015 + 0.03 * draw[4]
        frame = done.add(flat(BLACK if draw[5] < 0.5 else WHITE))
        done.decals.append(Decal(segment.surface, (place[0] - rim, place[1] + rim), (low - rim, low + high + rim), frame))
        contrast = 0.0 if draw[6] < 0.25 else draw[7]
        first, second = draw_colour(generator, "wall"), draw_colour(generator, "furniture")
        sheet = Material(
            "picture", first, second, scale_m=0.4 + draw[8], contrast=contrast, origin_m=(-5.0 * draw[6], -3.0 * draw[7])
        )
        done.decals.append(Decal(segment.surface, place, (low, low + high), done.add(sheet)))


def lay_rug(generator: np.random.Generator, layout: Layout, done: Decoration, families: tuple[str, ...]) -> None:
    """Lay a rug with a border on the floor, in two rooms of five."""
    draw = generator.random(6).tolist()
    length, width, _ = layout.size_m
    half_u, half_v = min(0.5 + draw[1], 0.4 * length), min(0.4 + 0.8 * draw[2], 0.4 * width)
    u, v = half_u + draw[3] * (length - 2 * half_u), half_v + draw[4] * (width - 2 * half_v)
    if draw[0] < 0.4:
        border = done.add(flat(draw_colour(generator, "furniture")))
        pile = done.add(draw_material(generator, "furniture", families))
        done.decals.append(Decal(0, (u - half_u, u + half_u), (v - half_v, v + half_v), border))
        rim = 0.03 + 0.1 * draw[5]
        done.decals.append(Decal(0, (u - half_u + rim, u + half_u - rim), (v - half_v + rim, v + half_v - rim), pile))


def cut_skylights(generator: np.random.Generator, layout: Layout, done: Decoration, day: float) -> None:
    """Paint bright skylights on the ceiling, in one room of six, each with its light."""
    if generator.random() > 0.16:
        return
    surface = 5 + int(generator.integers(len(layout.planes) - 5))
    plane = layout.planes[surface]
    pane = done.add(flat((0.8, 0.88, 0.97), emission=2.5 * day))
    frame = done.add(flat(WHITE))
    for draw in generator.random((int(generator.integers(1, 4)), 5)).tolist():
        x, y = 0.5 + draw[0] * (layout.size_m[0] - 1.0), 0.5 + draw[1] * (layout.size_m[1] - 1.0)
        point = (x, y, layout.ceiling_height_m(x, y))
        above = sum(n * p for n, p in zip(plane.normal, point, strict=True))
        if abs(above - plane.offset_m) > 1e-6 or _in_notch(layout, x, y):
            continue  # under the other slope, or in the missing corner
        u = sum(a * p for a, p in zip(plane.u_axis, point, strict=True))
        v = sum(a * p for a, p in zip(plane.v_axis, point, strict=True))
        half_u, half_v = 0.25 + 0.4 * draw[2], 0.25 + 0.4 * draw[3]
        done.decals.append(Decal(surface, (u - half_u - 0.06, u + half_u + 0.06), (v - half_v - 0.06, v + half_v + 0.06), frame))
        done.decals.append(Decal(surface, (u - half_u, u + half_u), (v - half_v, v + half_v), pane))
        strength = 3.0 * day * half_u * half_v
        normal = plane.normal
        below = (x, y, point[2] - 0.1)
        done.lamps.append(Lamp(below, (strength, strength, 1.08 * strength), half_u, (-normal[0], -normal[1], -normal[2])))


def put_beams(generator: np.random.Generator, layout: Layout, done: Decoration) -> None:
    """Run beams or ducts across the ceiling: often in halls, seldom elsewhere."""
    if generator.random() > (0.7 if layout.hall else 0.1) or layout.size_m[2] < layout.camera_m[2] + 1.0:
        return
    length, width, height = layout.size_m
    high, wide = 0.08 + 0.07 * generator.random(), 0.05 + 0.1 * generator.random()
    count = 2 + int(generator.integers(0, 5))
    for k in range(count):
        x = (k + 0.5) * length / count
        done.solids.append(Box((x, width / 2, height - high), (wide, width / 2 - 0.01, high), 0.0, (ACCENT,) * 6))
    if generator.random() < 0.4:
        y = width * (0.2 + 0.6 * generator.random())
        done.solids.append(Box((length / 2, y, height - 2 * high - 0.12), (length / 2 - 0.01, 0.08, 0.08), 0.0, (ACCENT,) * 6))


def put_lamps(generator: np.random.Generator, layout: Layout, done: Decoration, day: float) -> None:
    """Put up one to four lamps under the ceiling, never nearer than 0.8 m to the camera; by day they may be off."""
    length, width, _ = layout.size_m
    colour = draw_light(generator)
    count = int(generator.integers(1, 5)) if not layout.hall else 4
    on = day == 0.0 or generator.random() < 0.5
    strength = (1.0 if on else 0.12) * layout.free_area_m2 / count * 0.35
    glow = done.add(flat(WHITE, emission=3.0 if on else 0.3))
    kind = int(generator.integers(0, 4)) if not layout.hall else 1
    for draw in generator.random((count, 2 + 2 * TRIES)).tolist():
        half = ((0.15, 0.15, 0.03), (0.06, 0.6, 0.03), (0.3, 0.3, 0.015), (0.05, 0.05, 0.02))[kind]
        if draw[0] < 0.5:
            half = (half[1], half[0], half[2])
        for across, along in zip(draw[2::2], draw[3::2], strict=True):
            x, y = length * (0.12 + 0.76 * across), width * (0.12 + 0.76 * along)
            sides = [(x + a * half[0], y + b * half[1]) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            z = min(layout.ceiling_height_m(*side) for side in sides)
            position = (x, y, z - 0.15 - 2 * half[2])
            if math.dist(position, layout.camera_m) >= MIN_LAMP_DISTANCE_M and not _in_notch(layout, x, y):
                done.solids.append(Box((x, y, z - half[2]), half, 0.0, (glow,) * 6))
                red, green, blue = (colour * strength * (0.6 + 0.8 * draw[1])).tolist()
                done.lamps.append(Lamp(position, (red, green, blue), max(half)))
                break


def _in_notch(layout: Layout, x: float, y: float) -> bool:
    """Tell whether a point of the plan lies in the missing corner, or within 0.3 m of it."""
    if layout.notch is None:
        return False
    centre, half = layout.notch.centre_m, layout.notch.half_m
    return abs(x - centre[0]) < half[0] + 0.3 and abs(y - centre[1]) < half[1] + 0.3


def draw_sun(generator: np.random.Generator, done: Decoration, day: float) -> Sun | None:
    """Let the sun in by the first window, in one sunny room of three."""
    draw = generator.random(4).tolist()
    windows = [lamp for lamp in done.lamps if lamp.axis is not None and lamp.axis[2] == 0.0]
    if day == 0.0 or not windows or draw[0] > 0.35:
        return None
    inward = windows[0].axis
    assert inward is not None
    azimuth = math.atan2(-inward[1], -inward[0]) + (draw[1] - 0.5) * 2.0
    elevation = math.radians(15.0 + 40.0 * draw[2])
    flat_part = math.cos(elevation)
    strength = (4.0 + 8.0 * draw[3]) * day
    direction = (flat_part * math.cos(azimuth), flat_part * math.sin(azimuth), math.sin(elevation))
    return Sun(direction, done.windows[0], (strength, 0.9 * strength, 0.75 * strength))
