"""A scene from random numbers: shell, materials, openings, furniture, fittings, lights, in this order."""

from dataclasses import replace

import numpy as np

from lightning_plugins.engines.rendering.decoration import WHITE, Decoration, flat, put_doors, put_windows, segments
from lightning_plugins.engines.rendering.distribution import RoomDistribution
from lightning_plugins.engines.rendering.fittings import cut_skylights, draw_sun, hang_pictures, lay_rug, put_beams, put_lamps
from lightning_plugins.engines.rendering.furnishing import furnish
from lightning_plugins.engines.rendering.layout import ACCENT, BASEBOARD, WALL, draw_layout
from lightning_plugins.engines.rendering.palette import draw_colour, draw_light, draw_material
from lightning_plugins.engines.rendering.scene import Band, Material, Scene

PALETTE_SIZE = 6


def draw_scene(generator: np.random.Generator, distribution: RoomDistribution) -> Scene:
    """Draw a room and all that is in it."""
    layout = draw_layout(generator, distribution)
    families = distribution.texture_families
    materials = _shell_materials(generator, families)
    palette = list(range(len(materials), len(materials) + PALETTE_SIZE))
    materials += [draw_material(generator, "furniture", families) for _ in palette]
    lit = len(materials)
    materials.append(flat(draw_colour(generator, "wall"), emission=float(generator.choice([0.0, 0.0, 1.5, 2.5]))))

    done = Decoration(materials)
    if layout.notch is not None:
        done.solids.append(layout.notch)
    walls = segments(layout)
    day = float(generator.uniform(0.5, 1.6)) if generator.random() < 0.7 else 0.0
    put_doors(generator, layout, walls, done)
    # By night windows are dark, but they are there.
    put_windows(generator, layout, walls, done, day or 0.01)
    low, high = distribution.furniture_per_square_metre
    count = round(float(generator.uniform(low, high)) * layout.free_area_m2)
    count = min(max(count, int(np.ceil(low * layout.free_area_m2))), int(high * layout.free_area_m2))
    pieces = furnish(generator, layout, count, palette, lit)
    done.solids += [box for piece in pieces for box in piece]
    hang_pictures(generator, layout, walls, done)
    lay_rug(generator, layout, done, families)
    cut_skylights(generator, layout, done, day or 0.01)
    put_beams(generator, layout, done)
    put_lamps(generator, layout, done, day)
    sun = draw_sun(generator, done, day)
    bands = _bands(generator, done)

    glow = draw_light(generator) * (0.15 + 0.5 * generator.random())
    red, green, blue = glow.tolist()
    first_opening = len(layout.planes) + 6 * len(done.solids)
    panes = [first_opening + 6 * number + (done.openings[number].front ^ 1) for number in done.windows] if done.blind else []
    return Scene(
        shape=layout.shape,
        planes=layout.planes,
        solids=tuple(done.solids),
        openings=tuple(done.openings),
        decals=tuple(done.decals),
        materials=tuple(done.materials),
        lamps=tuple(done.lamps),
        sun=sun,
        piece_count=len(pieces),
        free_area_m2=layout.free_area_m2,
        camera_m=layout.camera_m,
        yaw_rad=layout.yaw_rad,
        ambient=(red, green, blue),
        bands=bands,
        unmeasured=tuple(panes),
    )


def _shell_materials(generator: np.random.Generator, families: tuple[str, ...]) -> list[Material]:
    """Return floor, wall, ceiling, baseboard and accent, in the order in which ``layout`` numbers them."""
    floor, wall, ceiling, accent = (draw_material(generator, role, families) for role in ("floor", "wall", "ceiling", "wall"))
    if generator.random() < 0.3:
        # Walls and ceiling painted in one go.
        ceiling = replace(ceiling, colour=wall.colour, second=wall.second)
    board = (
        WHITE if generator.random() < 0.5 else floor.colour if generator.random() < 0.6 else draw_colour(generator, "furniture")
    )
    return [floor, wall, ceiling, flat(board), accent]


def _bands(generator: np.random.Generator, done: Decoration) -> tuple[Band, ...]:
    """Return baseboard and wainscot, each in some of the rooms."""
    draw = generator.random(6).tolist()
    bands = []
    if draw[0] < 0.2:
        top = 0.8 + 0.5 * draw[1]
        red, green, blue = colour = draw_colour(generator, "wall")
        lower = done.add(replace(done.materials[WALL], colour=colour, second=(0.8 * red, 0.8 * green, 0.8 * blue)))
        bands += [Band(0.0, top, lower), Band(top, top + 0.03, ACCENT)]
    if draw[2] < 0.75:
        bands.append(Band(0.0, 0.05 + 0.1 * draw[3], BASEBOARD))
    return tuple(bands)
