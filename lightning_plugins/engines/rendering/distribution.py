"""What rooms there are: the ranges that a scene is drawn from, and the two named distributions, training and held-out.

The two differ in SHAPE (rectangular plans, and plans with a corner missing), in DENSITY of furniture and in TEXTURE FAMILY, and
in nothing that sets the metric scale: sizes of rooms and heights of cameras have the same ranges in both, so that a score on
held-out rooms measures transfer and not a shift of scale.
"""

from dataclasses import dataclass

from lightning_plugins._support.errors import InputError, nearest
from lightning_plugins.engines.rendering.textures import FAMILIES

SHAPES = ("box", "l_shaped", "sloped", "sloped_l_shaped")
MIN_HEADROOM_M = 0.7
MIN_CLEARANCE_M = 0.4
WALL_MARGIN_M = 0.1  # curtains and frames stand out from the wall


@dataclass(frozen=True)
class RoomDistribution:
    """Ranges that rooms are drawn from; every pair is (lowest, highest).

    Attributes:
        shapes: outlines, each equally likely: ``box``, ``l_shaped``, ``sloped``, ``sloped_l_shaped``.
        texture_families: families of procedural textures that floors, walls, ceilings and furniture are drawn from.
        furniture_per_square_metre: pieces of furniture per square metre of free floor.
        length_m: longer side of the floor.
        width_m: shorter side of the floor.
        height_m: height of the room at its highest point.
        camera_height_m: height of the camera above the floor.
        camera_clearance_m: least distance of the camera, seen from above, from walls and furniture, shelves and hanging shades
            included: a tripod stands in the open. What is fixed to the ceiling does not keep it: the middle of a lamp is 0.8 m
            away or more, its end, under a slope, may be nearer, and so may a beam.
        hall_share: share of rooms that are halls of up to 20 x 12 x 6 m, whatever the ranges above say.
        max_tilt_deg: half-angle of the cone that the camera's up direction is drawn from, evenly by solid angle; 180 is the
            whole sphere.

    Raises:
        InputError: if a range is empty, a name is unknown, or rooms would be too small or too large for the camera.
    """

    shapes: tuple[str, ...]
    texture_families: tuple[str, ...]
    furniture_per_square_metre: tuple[float, float]
    length_m: tuple[float, float] = (3.5, 12.0)
    width_m: tuple[float, float] = (3.0, 8.0)
    height_m: tuple[float, float] = (2.4, 4.5)
    camera_height_m: tuple[float, float] = (1.4, 1.65)
    camera_clearance_m: float = 0.9
    hall_share: float = 0.06
    max_tilt_deg: float = 0.0

    def __post_init__(self) -> None:
        _names("shapes", self.shapes, SHAPES)
        _names("texture_families", self.texture_families, tuple(FAMILIES))
        _range("furniture_per_square_metre", self.furniture_per_square_metre, 0.0, 1.0)
        _range("length_m", self.length_m, 2.5, 20.0)
        _range("width_m", self.width_m, 2.5, 12.0)
        _range("height_m", self.height_m, 2.0, 6.0)
        _range("camera_height_m", self.camera_height_m, 0.5, 2.5)
        if self.camera_height_m[1] + MIN_HEADROOM_M > self.height_m[0]:
            raise InputError(
                f"camera_height_m reaches {self.camera_height_m[1]} m in rooms as low as {self.height_m[0]} m; "
                f"leave {MIN_HEADROOM_M} m above the camera: lower camera_height_m or raise height_m"
            )
        narrowest = min(self.length_m[0], self.width_m[0])
        roomy = narrowest / 2 - WALL_MARGIN_M
        if not MIN_CLEARANCE_M <= self.camera_clearance_m < roomy:
            raise InputError(
                f"camera_clearance_m must be from {MIN_CLEARANCE_M} to less than {roomy:.2f} (half of the narrowest room, less "
                f"{WALL_MARGIN_M} for what hangs on walls), got {self.camera_clearance_m}"
            )
        strip = arm_width_m(self.camera_clearance_m)
        if any(shape.endswith("l_shaped") for shape in self.shapes) and strip >= narrowest:
            raise InputError(
                f"rooms as narrow as {narrowest} m have no corner to spare for an L: its arms are {strip:.2f} m wide at a "
                f"camera_clearance_m of {self.camera_clearance_m}; lower that, widen length_m and width_m, or leave L shapes out"
            )
        if not 0.0 <= self.hall_share <= 1.0:
            raise InputError(f"hall_share must be in [0, 1], got {self.hall_share}; 0.06 makes 6 % of the rooms halls")
        if not 0.0 <= self.max_tilt_deg <= 180.0:
            raise InputError(f"max_tilt_deg must be in [0, 180], got {self.max_tilt_deg}; 0 is level, 180 the whole sphere")


def arm_width_m(camera_clearance_m: float) -> float:
    """Return the least width of the arms of an L, so that the camera has a place in each."""
    return 2 * (camera_clearance_m + WALL_MARGIN_M) + WALL_MARGIN_M


def _names(field: str, given: tuple[str, ...], valid: tuple[str, ...]) -> None:
    if not isinstance(given, tuple) or not given:
        raise InputError(f"{field} must be a tuple of at least one name, got {given!r}; valid are {', '.join(valid)}")
    for name in given:
        if name not in valid:
            raise InputError(f"{field} has no {name!r}; {nearest(str(name), valid)}")


def _range(field: str, given: tuple[float, float], lowest: float, highest: float) -> None:
    if len(given) != 2 or not lowest <= given[0] <= given[1] <= highest:
        raise InputError(f"{field} must be (low, high) with {lowest} <= low <= high <= {highest}, got {given}")


TRAINING_ROOMS = RoomDistribution(
    shapes=("box", "sloped"),
    texture_families=("plain", "plaster", "planks", "tiles", "concrete", "carpet", "corrugated", "grain"),
    furniture_per_square_metre=(0.0, 0.35),
)

HELD_OUT_ROOMS = RoomDistribution(
    shapes=("l_shaped", "sloped_l_shaped"),
    texture_families=("stucco", "brick", "parquet", "marble", "wallpaper", "terrazzo", "hexagons"),
    furniture_per_square_metre=(0.40, 0.60),
)
