"""Furniture: pieces made of a few boxes each, placed on free floor, on walls and under the ceiling.

A piece is drawn in its own frame (x along its front, y away from the wall behind it, z up from the floor) as rows
``(x, y, z, half_x, half_y, half_z, colour slot)``, and then turned and moved to a place that keeps 0.45 m from the camera, stays inside the
room and outside the missing corner, and, if one is found in a few tries, off the other pieces. What would pass through a
sloping ceiling is made lower.
"""

from collections.abc import Callable
from itertools import islice

import numpy as np

from lightning_plugins.engines.rendering.layout import Layout
from lightning_plugins.engines.rendering.scene import Box

Part = tuple[float, float, float, float, float, float, int]
Draws = list[float]
CAMERA_CLEARANCE_M = 0.45
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
SLOTS = 4  # colour slots of a piece: body, second, third, lamp shade


def furnish(generator: np.random.Generator, layout: Layout, count: int, palette: list[int], lit: int) -> list[Box]:
    """Draw pieces of furniture.

    Args:
        count: how many.
        palette: numbers of the materials that furniture is made of.
        lit: number of the material of lamp shades.

    Returns:
        the boxes of all pieces.
    """
    makers = list(KINDS)
    weights = np.array([KINDS[make][0] for make in makers])
    kinds = generator.choice(len(makers), size=count, p=weights / weights.sum()).tolist()
    draws = generator.random((count, 8)).tolist()
    places = generator.random((count, TRIES * 4, 4)).tolist()
    slots = generator.choice(palette, size=(count, SLOTS - 1)).tolist()
    taken: list[tuple[float, float, float, float]] = []
    boxes: list[Box] = []
    for kind, draw, place, slot in zip(kinds, draws, places, slots, strict=True):
        make = makers[kind]
        found = _find(make(draw, layout.size_m[2]), KINDS[make][1], layout, islice(place, TRIES), taken)
        if found is None:
            # Nothing of that size fits here: a crate does nearly everywhere, and may stand against another piece.
            found = _find(_crate([0.4 * q for q in draw], 1.0), False, layout, iter(place), [])
        if found is not None:
            parts, extent = found
            taken.append(extent)
            boxes += _build(parts, [*slot, lit])
    return boxes


Placed = tuple[list[tuple[float, float, float, float, float, float, int, float]], tuple[float, float, float, float]]


def _find(parts: list[Part], at_wall: bool, layout: Layout, tries: "islice[list[float]] | object", taken: list) -> Placed | None:
    raise NotImplementedError
