"""Furniture: pieces made of a few boxes each, placed on free floor, on walls and under the ceiling.

A piece is drawn in its own frame (x along its front, y away from the wall behind it, z up from the floor) as rows ``(x, y,
z, half_x, half_y, half_z, colour slot)``, and then turned and moved to a place that keeps the layout's ``clearance_m`` from the
camera, stays inside the room and outside the missing corner, and, if one is found in a few tries, off the other pieces. What
would pass through a sloping ceiling is made lower.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lightning_plugins.engines.rendering.layout import Layout
from lightning_plugins.engines.rendering.scene import Box

Part = tuple[float, float, float, float, float, float, int]
Draws = list[float]
Extent = tuple[float, float, float, float]
TRIES = 8


def _cabinet(r: Draws, room_m: float) -> list[Part]:
    w, d, h = 0.2 + 0.7 * r[0], 0.17 + 0.15 * r[1], 0.3 + 0.8 * r[2]
    if r[3] < 0.5:
        return [(0, 0, h, w, d, h, 0)]
    return [(0, 0, h, w, d, h, 0), (0, 0, 2 * h + 0.02, w + 0.02, d + 0.02, 0.02, 1)]


def _bookcase(r: Draws, room_m: float) -> list[Part]:
    w, d, h = 0.3 + 0.4 * r[0], 0.14 + 0.06 * r[1], 0.5 + 0.55 * r[2]
    shelves = 3 + int(2 * r[3])
    parts: list[Part] = [(-w, 0, h, 0.015, d, h, 0), (w, 0, h, 0.015, d, h, 0), (0, -d + 0.01, h, w, 0.01, h, 0)]
    for k in range(shelves):
        level = (k + 0.5) * 2 * h / shelves
        parts.append((0, 0, level, w, d, 0.015, 0))
        books = w * (0.3 + 0.6 * r[4 + k % 3])
        parts.append((books - w, -0.03, level + 0.12, books, d - 0.05, 0.11, 1 + k % 2))
    return parts


def _sofa(r: Draws, room_m: float) -> list[Part]:
    w, d, seat = 0.45 + 0.65 * r[0], 0.38 + 0.1 * r[1], 0.2 + 0.04 * r[2]
    back = 0.12 + 0.05 * r[3]
    return [
        (0, 0, seat, w, d, seat, 0),
        (0, back - d, seat + 0.2, w, back, seat + 0.2, 0),
        (-w - 0.08, 0, 0.3, 0.08, d, 0.3, 0),
        (w + 0.08, 0, 0.3, 0.08, d, 0.3, 0),
        (w * (r[4] - 0.5), 2 * back - d + 0.07, 2 * seat + 0.17, 0.2, 0.07, 0.17, 1),
    ]


def _bed(r: Draws, room_m: float) -> list[Part]:
    w, d, h = 0.45 + 0.45 * r[0], 0.95 + 0.1 * r[1], 0.2 + 0.1 * r[2]
    return [
        (0, 0, h / 2, w, d, h / 2, 0),
        (0, 0.02, 1.5 * h, w - 0.02, d, h / 2, 1),
        (0, -d, 0.45, w + 0.03, 0.03, 0.45, 0),
        (0, 0.3 - d, 2 * h + 0.06, w * 0.7, 0.2, 0.07, 2),
    ]


def _table(r: Draws, room_m: float) -> list[Part]:
    w, d, h, leg = 0.35 + 0.6 * r[0], 0.3 + 0.2 * r[1], 0.2 + 0.17 * r[2], 0.02 + 0.02 * r[3]
    parts: list[Part] = [(0, 0, 2 * h + 0.02, w, d, 0.02, 0)]
    parts += [(x * (w - leg - 0.03), y * (d - leg - 0.03), h, leg, leg, h, 1) for x in (-1, 1) for y in (-1, 1)]
    if r[4] < 0.5:
        parts.append((w * (r[5] - 0.5), 0, 2 * h + 0.16, 0.06 + 0.2 * r[6], 0.05 + 0.1 * r[5], 0.12, 2))
    return parts


def _desk(r: Draws, room_m: float) -> list[Part]:
    w, d, h = 0.5 + 0.3 * r[0], 0.28 + 0.12 * r[1], 0.36
    return [
        (0, 0, 2 * h, w, d, 0.02, 0),
        (-w + 0.02, 0, h, 0.02, d, h, 0),
        (w - 0.2 * r[2] - 0.02, 0, h, 0.2 * r[2] + 0.02, d, h, 0),
        (0, -0.6 * d, 2 * h + 0.24, 0.28, 0.015, 0.17, 1),
    ]


def _chair(r: Draws, room_m: float) -> list[Part]:
    w, h = 0.2 + 0.04 * r[0], 0.22 + 0.02 * r[1]
    legs: list[Part] = [(x * (w - 0.03), y * (w - 0.03), h, 0.018, 0.018, h, 1) for x in (-1, 1) for y in (-1, 1)]
    if r[2] < 0.4:
        legs = [(0, 0, h, 0.03, 0.03, h, 1), (0, 0, 0.03, w, w, 0.02, 1)]
    return [(0, 0, 2 * h, w, w, 0.025, 0), (0, 0.02 - w, 2 * h + 0.24, w, 0.02, 0.24, 0), *legs]


def _crate(r: Draws, room_m: float) -> list[Part]:
    w, d, h = (0.12 + 0.3 * q * q for q in r[:3])
    if r[3] < 0.7:
        return [(0, 0, h, w, d, h, 0)]
    return [(0, 0, h, w, d, h, 0), (0.1 * r[4], 0, 2 * h + 0.6 * h, 0.8 * w, 0.8 * d, 0.6 * h, 2)]


def _pillar(r: Draws, room_m: float) -> list[Part]:
    w = 0.1 + 0.15 * r[0]
    return [(0, 0, room_m / 2 + 0.1, w, w if r[1] < 0.7 else 0.7 * w, room_m / 2 + 0.1, 0)]


def _floor_lamp(r: Draws, room_m: float) -> list[Part]:
    h = 0.55 + 0.3 * r[0]
    return [(0, 0, h, 0.012, 0.012, h, 1), (0, 0, 0.015, 0.14, 0.14, 0.015, 1), (0, 0, 2 * h, 0.16, 0.16, 0.13, 3)]


def _panel(r: Draws, room_m: float) -> list[Part]:
    w, h = 0.4 + 0.5 * r[0], 0.5 + 0.4 * r[1]
    return [(0, 0, h + 0.1, w, 0.02, h, 0), (0, 0, 0.05, 0.05, 0.25, 0.05, 1)]


def _shelf(r: Draws, room_m: float) -> list[Part]:
    w, d, z = 0.25 + 0.5 * r[0], 0.09 + 0.1 * r[1], 1.0 + 0.8 * r[2]
    if r[3] < 0.4:
        return [(0, 0, z + 0.3, w, d, 0.3, 0)]
    return [(0, 0, z, w, d, 0.015, 0), (w * (r[4] - 0.5), 0, z + 0.12, 0.35 * w, 0.7 * d, 0.1, 2)]


def _pendant(r: Draws, room_m: float) -> list[Part]:
    z, w = room_m - 0.35 - 0.3 * r[0], 0.08 + 0.18 * r[1]
    return [(0, 0, z, w, w, 0.07 + 0.08 * r[2], 3), (0, 0, (z + room_m) / 2, 0.01, 0.01, (room_m - z) / 2, 1)]


# kind: (weight, stands against a wall)
KINDS: dict[Callable[[Draws, float], list[Part]], tuple[float, bool]] = {
    _cabinet: (4.0, True), _bookcase: (1.5, True), _sofa: (2.0, True), _bed: (0.8, True), _table: (2.5, False),
    _desk: (1.2, True), _chair: (3.0, False), _crate: (2.5, False), _pillar: (0.5, False), _floor_lamp: (0.8, True),
    _panel: (0.5, False), _shelf: (2.0, True), _pendant: (1.0, False),
}  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A place for a piece: where, how it is turned, how much lower it is made, and the floor it takes (x0, x1, y0, y1)."""

    x_m: float
    y_m: float
    quarter: int
    yaw_rad: float
    squeeze: float
    extent: Extent


def furnish(generator: np.random.Generator, layout: Layout, count: int, palette: list[int], lit: int) -> list[list[Box]]:
    """Draw pieces of furniture.

    Args:
        count: how many.
        palette: numbers of the materials that furniture is made of.
        lit: number of the material of lamp shades, slot 3 of a piece; the other slots are drawn from the palette.

    Returns:
        the boxes of each piece.
    """
    makers = list(KINDS)
    weights = np.array([KINDS[make][0] for make in makers])
    kinds = generator.choice(len(makers), size=count, p=weights / weights.sum()).tolist()
    draws = generator.random((count, 8)).tolist()
    places = generator.random((count, 40, 4)).tolist()
    slots = generator.choice(palette, size=(count, 3)).tolist()
    taken: list[Extent] = []
    pieces: list[list[Box]] = []
    for kind, draw, tries, slot in zip(kinds, draws, places, slots, strict=True):
        make = makers[kind]
        parts = make(draw, layout.size_m[2])
        found = _find(parts, KINDS[make][1], layout, tries[:TRIES], taken)
        if found is None:
            # Nothing of that size fits: a small crate does nearly everywhere, and may stand against another piece.
            parts = _crate([0.4 * q for q in draw], 0.0)
            found = _find(parts, False, layout, tries, [])
        if found is not None:
            taken.append(found.extent)
            pieces.append([_placed(part, found, [*slot, lit]) for part in parts])
    return pieces


def _find(parts: list[Part], at_wall: bool, layout: Layout, tries: list[Draws], taken: list[Extent]) -> Spot | None:
    """Return the first spot among ``tries`` that is free, or None."""
    half_x = max(abs(part[0]) + part[3] for part in parts)
    half_y = max(abs(part[1]) + part[4] for part in parts)
    top = max(part[2] + part[5] for part in parts)
    length, width, height = layout.size_m
    camera_x, camera_y, _ = layout.camera_m
    obstacles = list(taken)
    if layout.notch is not None:
        (x, y, _), (a, b, _) = layout.notch.centre_m, layout.notch.half_m
        obstacles.append((x - a, x + a, y - b, y + b))
    for where, side, askew, angle in tries:
        quarter = int(4 * side)
        yaw = 0.5 * math.pi * quarter + (0.0 if at_wall or askew < 0.5 else 2.0 * math.pi * angle)
        c, s = math.cos(yaw), math.sin(yaw)
        x_extent, y_extent = abs(c) * half_x + abs(s) * half_y, abs(s) * half_x + abs(c) * half_y
        if 2 * x_extent + 0.02 > length or 2 * y_extent + 0.02 > width:
            continue
        x = 0.01 + x_extent + where * (length - 2 * x_extent - 0.02)
        y = 0.01 + y_extent + (angle if askew < 0.5 else askew) * (width - 2 * y_extent - 0.02)
        if at_wall:
            x, y = ((x, 0.01 + half_y), (length - 0.01 - half_y, y), (x, width - 0.01 - half_y), (0.01 + half_y, y))[quarter]
        dx, dy = camera_x - x, camera_y - y
        gap_x, gap_y = abs(c * dx + s * dy) - half_x, abs(c * dy - s * dx) - half_y
        if math.hypot(max(gap_x, 0.0), max(gap_y, 0.0)) < layout.clearance_m:
            continue
        x0, x1, y0, y1 = extent = (x - x_extent, x + x_extent, y - y_extent, y + y_extent)
        if any(x0 < right and left < x1 and y0 < far and near < y1 for left, right, near, far in obstacles):
            continue
        limit = min(layout.ceiling_height_m(px, py) for px in (x0, x1) for py in (y0, y1)) - 0.02
        squeeze = 1.0 if top <= limit or top > height else limit / top
        if squeeze > 0.3:
            return Spot(x, y, quarter, yaw, squeeze, extent)
    return None


def _placed(part: Part, spot: Spot, materials: list[int]) -> Box:
    """Return a part turned and moved to its spot; quarter turns swap sides instead, which keeps the ray casting cheap."""
    x, y, z, half_x, half_y, half_z, slot = part
    c, s = math.cos(spot.yaw_rad), math.sin(spot.yaw_rad)
    centre = (spot.x_m + c * x - s * y, spot.y_m + s * x + c * y, z * spot.squeeze)
    yaw = spot.yaw_rad
    if yaw == 0.5 * math.pi * spot.quarter:
        yaw = 0.0
        if spot.quarter % 2:
            half_x, half_y = half_y, half_x
    return Box(centre, (half_x, half_y, half_z * spot.squeeze), yaw, (materials[slot],) * 6)
