"""A room as data: planes, boxes, openings, pictures, lamps, materials and the camera. Nothing here computes an image.

Frame of the room: right-handed, z up, floor at z = 0, one corner of the floor's bounding rectangle at the origin, walls
along x and y. Lengths are metres, angles radians, colours linear RGB albedos in [0, 1].

Surfaces are numbered: first the planes of the shell, then six faces for every solid, then six for every opening. The faces
of a box are -x, +x, -y, +y, -z, +z in the box's own frame.
"""

from dataclasses import dataclass

Vector = tuple[float, float, float]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    """How a surface looks.

    Attributes:
        family: name of the texture, a key of ``textures.FAMILIES`` or ``textures.FIXTURES``.
        colour: its main colour.
        second: colour of joints, veins, or the other tone.
        scale_m: size of the pattern's repeating unit.
        contrast: strength of the pattern in [0, 1].
        gloss: share of mirrored lamp light in [0, 1].
        emission: light given off, relative to a white surface under the room's mean light.
        origin_m: the texture's own origin on the surface.
    """

    family: str
    colour: Colour
    second: Colour
    scale_m: float = 1.0
    contrast: float = 0.5
    gloss: float = 0.0
    emission: float = 0.0
    origin_m: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Plane:
    """A bounding plane of the shell: the room lies where ``normal . x <= offset_m``."""

    normal: Vector
    offset_m: float
    u_axis: Vector
    v_axis: Vector
    material: int


@dataclass(frozen=True)
class Box:
    """A solid box turned about the vertical; ``faces`` holds the material of -x, +x, -y, +y, -z, +z."""

    centre_m: Vector
    half_m: Vector
    yaw_rad: float
    faces: tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Opening:
    """A window, door or niche: a box behind surface ``surface``, open where its face ``front`` lies in that surface."""

    surface: int
    box: Box
    front: int


@dataclass(frozen=True)
class Decal:
    """A flat thing on a surface (picture, rug, skylight): a rectangle in the surface's own coordinates."""

    surface: int
    u_m: tuple[float, float]
    v_m: tuple[float, float]
    material: int


@dataclass(frozen=True)
class Band:
    """A strip around all walls between two heights: baseboard, wainscot."""

    low_m: float
    high_m: float
    material: int


@dataclass(frozen=True)
class Lamp:
    """A light of a certain size; ``axis`` is given for one that shines to one side only, such as a window.

    ``colour`` is the light it would throw on a white surface that faces it from one metre away.
    """

    position_m: Vector
    colour: Colour
    radius_m: float
    axis: Vector | None = None


@dataclass(frozen=True)
class Sun:
    """Sunlight that enters by opening number ``opening``: ``direction`` points from the room to the sun."""

    direction: Vector
    opening: int
    colour: Colour


@dataclass(frozen=True)
class Scene:
    """One room with all that stands in it, and where the camera is.

    Attributes:
        shape: one of ``distribution.SHAPES``.
        planes: the convex shell; the floor first, then the four walls (-x, +x, -y, +y), then the ceiling's one or two planes.
        solids: boxes; in an L-shaped room the first one is the corner that is missing.
        openings: holes in surfaces.
        decals: painted in this order.
        piece_count: pieces of furniture; each is one or more of the solids.
        free_area_m2: floor area that furniture may stand on.
        camera_m: the camera's place.
        yaw_rad: turn about the vertical from the room's frame to the levelled camera's.
        ambient: light that comes from everywhere.
        unmeasured: surfaces that give a depth sensor nothing, such as panes of glass.
    """

    shape: str
    planes: tuple[Plane, ...]
    solids: tuple[Box, ...]
    openings: tuple[Opening, ...]
    decals: tuple[Decal, ...]
    materials: tuple[Material, ...]
    lamps: tuple[Lamp, ...]
    sun: Sun | None
    piece_count: int
    free_area_m2: float
    camera_m: Vector
    yaw_rad: float
    ambient: Colour
    bands: tuple[Band, ...]
    unmeasured: tuple[int, ...]
