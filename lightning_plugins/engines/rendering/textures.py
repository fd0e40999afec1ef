"""Procedural textures by named family: for every pixel of a surface how near it is to the second colour, and how bright.

A texture is a function of surface coordinates in metres. It returns ``mix`` (0 is the material's main colour, 1 its second
one) and ``shade`` (around 1), one number a pixel; colours come in once for the whole image. Joints are drawn with their
coverage of the pixel, and patterns fade into their mean as the pixel's footprint nears their period, so that nothing
aliases.

``FAMILIES`` are the textures of floors, walls, ceilings and furniture, the ones that a distribution names; ``FIXTURES`` are
what a door, a window's view, a picture or a lamp shows, which is the same everywhere. Cost: 10 to 60 passes over a surface's
pixels.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lightning_plugins.engines.rendering.noise import noise, scatter
from lightning_plugins.engines.rendering.scene import Material

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Floating = npt.NDArray[np.floating]
Pattern = tuple[Floating, Floating]
Texture = Callable[[Float32, Float32, Float32, Material], Pattern]


def _cells(x: Float32, period_m: float) -> tuple[Int32, Float32]:
    """Return the number of each coordinate's cell and the distance from the nearer cell border in metres."""
    scaled = x * (1.0 / period_m)
    cell = np.floor(scaled)
    scaled -= cell
    return cell.astype(np.int32), np.minimum(scaled, 1.0 - scaled) * period_m


def _line(distance_m: Floating, half_width_m: float, footprint_m: Float32) -> Floating:
    """Return how much of a pixel a line covers, given the pixel's distance from the line's middle."""
    cover = np.clip((half_width_m - distance_m) / footprint_m + 0.5, 0.0, 1.0)
    return cover * np.minimum(1.0, 2.0 * half_width_m / footprint_m)


def _fade(footprint_m: Float32, period_m: float) -> Floating:
    """Return the contrast that is left of a pattern: 1 near by, 0 where two pixels span a period."""
    return np.clip(1.6 - footprint_m * (2.0 / period_m), 0.0, 1.0)


def plain(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Paint, nearly even, a little uneven where it was rolled on."""
    return np.zeros_like(u), 1.0 + 0.035 * material.contrast * noise("cloud", u, v, footprint_m, 0.03)


def plaster(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Plaster with broad stains and fine relief."""
    broad = noise("cloud", u, v, footprint_m, 0.04 * material.scale_m)
    fine = noise("grain", u, v, footprint_m, 0.012)
    return 0.3 + 0.3 * material.contrast * broad, 1.0 + 0.05 * material.contrast * fine


def planks(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Boards of one width and random ends."""
    width = 0.14 * material.scale_m
    row, across = _cells(v, width)
    board, along = _cells(u + 0.37 * scatter(row, row) * width * 9.0, 9.0 * width)
    tone = scatter(row, board)
    fibres = noise("streak", u + 3.1 * tone, v + 7.7 * tone, footprint_m, 0.006)
    joint = np.maximum(_line(across, 0.002, footprint_m), _line(along, 0.002, footprint_m))
    fade = _fade(footprint_m, width)
    contrast = material.contrast
    return 0.4 + contrast * (0.35 * tone * fade + 0.25 * fibres), 1.0 - 0.6 * joint


def tiles(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Square tiles with grout; a chessboard where the contrast is high."""
    side = 0.4 * material.scale_m
    i, across = _cells(u, side)
    j, along = _cells(v, side)
    joint = _line(np.minimum(across, along), 0.004, footprint_m)
    tone = scatter(i, j)
    fade = _fade(footprint_m, side)
    if material.contrast > 0.75:
        mix = 0.5 + ((i + j) & 1).astype(np.float32) * fade - 0.5 * fade
        return mix, (1.0 + 0.03 * tone * fade) * (1.0 - 0.35 * joint)
    return 0.8 * joint, 1.0 + 0.12 * material.contrast * tone * fade


def concrete(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Cast concrete: clouds of stain, pores, wide joints."""
    clouds = noise("cloud", u, v, footprint_m, 0.025 * material.scale_m)
    pores = noise("grain", v, u, footprint_m, 0.01)
    _, across = _cells(u, 2.4 * material.scale_m)
    _, along = _cells(v, 1.9 * material.scale_m)
    joint = _line(np.minimum(across, along), 0.006, footprint_m)
    return 0.35 + 0.45 * material.contrast * clouds, (1.0 + 0.08 * material.contrast * pores) * (1.0 - 0.4 * joint)


def carpet(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Pile: fine speckle over soft footmarks."""
    pile = noise("grain", u, v, footprint_m, 0.008 * material.scale_m)
    marks = noise("cloud", u, v, footprint_m, 0.02)
    return 0.3 + 0.35 * material.contrast * pile, 1.0 + 0.06 * marks


def corrugated(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Sheet metal, panelling or a curtain: upright folds."""
    period = 0.12 * material.scale_m
    bend = noise("cloud", u, 0.1 * v, footprint_m, 0.03)
    wave = np.sin(u * (2.0 * np.pi / period) + 0.6 * bend) * _fade(footprint_m, period)
    sheet, _ = _cells(u, 7.0 * period)
    return 0.3 + 0.3 * scatter(sheet, sheet) * material.contrast, 1.0 + 0.4 * material.contrast * wave + 0.04 * bend


def grain(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Veneer: long fibres with soft bands."""
    fibres = noise("streak", u, v, footprint_m, 0.012 * material.scale_m)
    bands = noise("streak", v, u, footprint_m, 0.05)
    return 0.4 + 0.4 * material.contrast * fibres, 1.0 + 0.03 * bands


def stucco(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Rough cast: raised strokes of one colour."""
    strokes = noise("vein", u, v, footprint_m, 0.015 * material.scale_m)
    clouds = noise("cloud", v, u, footprint_m, 0.06)
    return 0.2 + 0.12 * clouds * material.contrast, 1.0 + 0.07 * material.contrast * strokes


def brick(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Bricks in running bond."""
    high = 0.085 * material.scale_m
    course, across = _cells(v, high)
    stone, along = _cells(u + (course & 1).astype(np.float32) * (1.5 * high), 3.0 * high)
    mortar = _line(np.minimum(across, along), 0.07 * high, footprint_m)
    tone = scatter(course, stone) * _fade(footprint_m, 2.0 * high)
    pores = noise("grain", u, v, footprint_m, 0.01)
    return mortar, (1.0 + 0.22 * material.contrast * tone) * (1.0 + 0.07 * pores)


def parquet(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Basket weave: square blocks of strips that run by turns along u and along v."""
    block = 0.32 * material.scale_m
    i, across = _cells(u, block)
    j, along = _cells(v, block)
    turned = ((i + j) & 1).astype(bool)
    strip, edge = _cells(np.where(turned, u, v), block / 5.0)
    tone = scatter(strip + 31 * i, j + 17 * strip)
    fibres = noise("streak", np.where(turned, v, u) + tone, np.where(turned, u, v), footprint_m, 0.006)
    joint = _line(np.minimum(edge, np.minimum(across, along)), 0.0015, footprint_m)
    weave = (turned.astype(np.float32) - 0.5) * _fade(footprint_m, block)
    contrast = material.contrast
    return 0.45 + contrast * (0.3 * tone * _fade(footprint_m, block / 5.0) + 0.2 * fibres + 0.25 * weave), 1.0 - 0.5 * joint


def marble(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Polished stone: veins of two sizes over clouds, in slabs."""
    slab = 0.9 * material.scale_m
    i, across = _cells(u, slab)
    j, along = _cells(v, slab)
    shift = 2.3 * scatter(i, j)
    veins = noise("vein", u + shift, v - shift, footprint_m, 0.012 * material.scale_m)
    clouds = noise("cloud", v + shift, u, footprint_m, 0.03 * material.scale_m)
    joint = _line(np.minimum(across, along), 0.002, footprint_m)
    return 0.2 + material.contrast * (0.22 * veins + 0.15 * clouds), 1.0 - 0.4 * joint


def wallpaper(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Printed paper: a lattice of medallions, or stripes where the contrast is high."""
    period = 0.22 * material.scale_m
    fade = _fade(footprint_m, period)
    a, b = np.cos(u * (2.0 * np.pi / period)), np.cos(v * (np.pi / period))
    if material.contrast > 0.6:
        return 0.5 + 0.5 * fade * np.clip(3.0 * a, -1.0, 1.0), 1.0 + 0.02 * noise("cloud", u, v, footprint_m, 0.03)
    motif = np.clip(4.0 * (np.abs(a * b) - 0.55), -1.0, 1.0) * fade
    return 0.4 + 0.9 * material.contrast * motif, 1.0 + 0.02 * noise("cloud", u, v, footprint_m, 0.03)


def terrazzo(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Chips of stone in cement."""
    chips = noise("grain", u, v, footprint_m, 0.02 * material.scale_m)
    dark = noise("grain", v, u, footprint_m, 0.014 * material.scale_m)
    return 0.7 * np.clip(1.5 * chips - 1.0, 0.0, 1.0), 1.0 - 0.25 * material.contrast * np.clip(1.5 * dark - 1.2, 0.0, 1.0)


def hexagons(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """Hexagonal tiles: each pixel belongs to the nearer of two rectangular lattices of centres."""
    wide = 0.26 * material.scale_m
    high = wide * 1.7320508
    x, y = u * (1.0 / wide), v * (1.0 / high)
    i0, j0 = np.round(x), np.round(y)
    i1, j1 = np.floor(x) + 0.5, np.floor(y) + 0.5
    x0, y0, x1, y1 = (x - i0) * wide, (y - j0) * high, (x - i1) * wide, (y - j1) * high
    d0, d1 = x0 * x0 + y0 * y0, x1 * x1 + y1 * y1
    first = d0 < d1
    px, py = np.abs(np.where(first, x0, x1)), np.abs(np.where(first, y0, y1))
    edge = 0.5 * wide - np.maximum(px, 0.5 * px + 0.8660254 * py)
    tone = scatter(np.where(first, 2 * i0, 2 * i1).astype(np.int32), np.where(first, 2 * j0, 2 * j1).astype(np.int32))
    fade = _fade(footprint_m, wide)
    return 0.3 + material.contrast * 0.4 * tone * fade, 1.0 - 0.4 * _line(edge, 0.003, footprint_m)


def flat(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """One colour: frames, lamps, bars."""
    return np.zeros_like(u), np.ones_like(u)


def door(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """A door's leaf: two columns of sunken panels and a dark handle."""
    wide = material.scale_m
    _, across = _cells(u, 0.5 * wide)
    _, along = _cells(v, 0.9)
    rim = np.minimum(across - 0.13 * wide, along - 0.12)
    groove = _line(np.abs(rim), 0.012, footprint_m)
    handle = (np.abs(u - 0.92 * wide) < 0.03) & (np.abs(v - 1.02) < 0.06)
    shade = (1.0 - 0.45 * groove) * np.where(handle, np.float32(0.25), np.float32(1.0))
    return np.where(rim > 0.0, np.float32(0.35), np.float32(0.0)), shade


def outdoors(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """A window: bars, and behind them sky over trees and ground. ``scale_m`` is the spacing of the bars."""
    _, across = _cells(u, material.scale_m)
    _, along = _cells(v, 1.3 * material.scale_m)
    bars = _line(np.minimum(across, along), 0.022, footprint_m)
    skyline = 0.5 + 1.3 * material.contrast + 0.25 * noise("cloud", u, 0.0 * v, footprint_m, 0.02)
    sky = np.clip(2.0 * (v - skyline), 0.0, 1.0)
    leaves = noise("cloud", u, v, footprint_m, 0.015)
    return 1.0 - sky, (1.0 - 0.88 * bars) * (0.7 + 0.3 * sky + 0.16 * leaves * (1.0 - sky))


def picture(u: Float32, v: Float32, footprint_m: Float32, material: Material) -> Pattern:
    """A picture: fields of two colours, hard and soft."""
    fields = noise("cloud", u, v, footprint_m, 0.016 * material.scale_m)
    strokes = noise("streak", v, u, footprint_m, 0.012 * material.scale_m)
    return np.clip(0.5 + 1.5 * material.contrast * fields, 0.0, 1.0), 0.85 + 0.35 * material.contrast * strokes


FAMILIES: dict[str, Texture] = {
    texture.__name__: texture
    for texture in (
        plain, plaster, planks, tiles, concrete, carpet, corrugated, grain,
        stucco, brick, parquet, marble, wallpaper, terrazzo, hexagons,
    )
}  # fmt: skip
FIXTURES: dict[str, Texture] = {texture.__name__: texture for texture in (flat, door, outdoors, picture)}
TEXTURES: dict[str, Texture] = {**FAMILIES, **FIXTURES}
