"""Colours and materials of a room: which texture family goes where, and in which colours.

Colours are linear albedos. Walls and ceilings are mostly pale neutrals, floors mostly wood, stone and grey, furniture
anything; now and then every one of them is dark or vivid, so that no surface can be told by its brightness alone.
"""

import numpy as np

from lightning_plugins.engines.rendering.scene import Colour, Material

# family: how readily it is used for floors, walls, ceilings, furniture
ROLES = ("floor", "wall", "ceiling", "furniture")
USES: dict[str, tuple[float, float, float, float]] = {
    "plain": (1.0, 6.0, 6.0, 5.0),
    "plaster": (0.5, 3.0, 3.0, 0.5),
    "planks": (5.0, 0.7, 0.8, 1.5),
    "tiles": (3.0, 0.8, 0.6, 0.2),
    "concrete": (2.5, 1.2, 1.2, 0.4),
    "carpet": (2.5, 0.2, 0.1, 1.5),
    "corrugated": (0.1, 0.9, 0.5, 0.5),
    "grain": (1.0, 0.4, 0.4, 4.0),
    "stucco": (1.0, 6.0, 6.0, 4.0),
    "brick": (0.7, 1.3, 0.3, 0.2),
    "parquet": (4.0, 0.4, 0.3, 1.0),
    "marble": (2.0, 0.8, 0.15, 3.0),
    "wallpaper": (0.5, 2.5, 0.3, 1.5),
    "terrazzo": (3.0, 0.3, 0.1, 1.5),
    "hexagons": (2.0, 0.5, 0.05, 0.2),
}
WOODEN = ("planks", "grain", "parquet")
# Chance of a vivid, and of a dark colour.
MOODS = {"floor": (0.03, 0.3), "wall": (0.10, 0.10), "ceiling": (0.02, 0.14), "furniture": (0.2, 0.3)}
WOOD = np.array(
    [(0.42, 0.24, 0.11), (0.55, 0.37, 0.20), (0.25, 0.12, 0.05), (0.62, 0.48, 0.31), (0.12, 0.06, 0.03), (0.38, 0.30, 0.22)]
)


def _tuple(colour: np.ndarray) -> Colour:
    red, green, blue = np.clip(colour, 0.01, 0.92).tolist()
    return red, green, blue


def draw_colour(generator: np.random.Generator, role: str, family: str = "plain") -> Colour:
    """Draw the main colour of a surface."""
    draw = generator.random(6)
    vivid, dark = MOODS[role]
    if family in WOODEN and draw[0] < 0.85:
        colour = WOOD[int(draw[1] * len(WOOD))] * (0.7 + 0.6 * draw[2])
    elif family == "brick" and draw[0] < 0.6:
        colour = np.array([0.36, 0.14, 0.08]) * (0.6 + draw[2])
    elif draw[0] < vivid:
        hue = 2.0 * np.pi * (draw[1] + np.array([0.0, 1.0, 2.0]) / 3.0)
        colour = (0.1 + 0.4 * draw[2]) * (1.0 + (0.15 + (0.6 if role == "furniture" else 0.35) * draw[3]) * np.cos(hue))
    else:
        value = 0.03 + 0.2 * draw[1] if draw[0] < vivid + dark else 0.35 + 0.5 * draw[1] ** 0.7
        warmth = 0.22 * (draw[2] - 0.3)
        colour = value * np.array([1.0 + warmth, 1.0 + 0.06 * (draw[3] - 0.3), 1.0 - warmth])
    return _tuple(colour)


def draw_material(generator: np.random.Generator, role: str, families: tuple[str, ...]) -> Material:
    """Draw a material for a role: its family by how readily it is used there, then its colours and size."""
    weights = np.array([USES[family][ROLES.index(role)] for family in families])
    family = families[int(generator.choice(len(families), p=weights / weights.sum()))]
    colour = draw_colour(generator, role, family)
    draw = generator.random(7)
    # The second tone: darker or lighter wood, pale or dark joints, another shade of the same paint.
    factor = 0.45 + 0.4 * draw[0] if draw[1] < 0.7 else 1.3 + 0.6 * draw[0]
    second = np.array(colour) * factor + 0.06 * (draw[2] - 0.5)
    if family in ("brick", "tiles"):
        second = np.full(3, 0.15 + 0.55 * draw[0])
    gloss = 0.25 * draw[3] ** 2 if role in ("floor", "furniture") else 0.04 * draw[3]
    return Material(
        family=family,
        colour=colour,
        second=_tuple(second),
        scale_m=float(0.7 + 0.9 * draw[4]),
        contrast=float(0.15 + 0.85 * draw[5]),
        gloss=float(gloss),
        origin_m=(-float(9.0 * draw[6]), -float(7.0 * draw[5])),
    )


def draw_light(generator: np.random.Generator) -> np.ndarray:
    """Draw the colour of a lamp, from warm bulb to cold tube, of mean 1."""
    warmth = generator.normal(0.12, 0.16)
    colour = np.array([1.0 + warmth, 1.0 + generator.normal(0.0, 0.02), 1.0 - 1.3 * warmth])
    return np.asarray(np.clip(colour, 0.3, None) / colour.mean())
