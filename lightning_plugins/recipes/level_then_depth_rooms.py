"""The rooms that ``level_then_depth`` judges on: each seen by a tilted camera and by a level one, rendered once."""

import numpy as np

from lightning_plugins import RenderedRooms
from lightning_plugins.datamodules.rendered_rooms import room_item
from lightning_plugins.models.panoramic_upright.recovery import TiltedRoom

MOST_TILT_DEG = 40


class TiltedRooms:
    """The held-out rooms of a data module, tilted by up to 40 degrees, even over the cone.

    Args:
        rooms: how many there are, their height and their seed.
    """

    def __init__(self, rooms: RenderedRooms) -> None:
        count, height, tilt = rooms.counts["test"], rooms.height, f"cone:{MOST_TILT_DEG}"
        cache = None if rooms.cache is None else str(rooms.cache)
        self.cameras = [
            RenderedRooms(test_rooms=count, height=rows, seed=rooms.seed, cache=cache, tilt=cone).rooms("test")
            for rows, cone in ((2 * height, tilt), (height, tilt), (height, "cone:0"))
        ]
        up = self.cameras[0].up
        assert up is not None
        self.tilt_deg = np.degrees(np.arctan2(np.hypot(up[:, 0], up[:, 1]), up[:, 2]))

    def __getitem__(self, index: int) -> TiltedRoom:
        sharp, tilted, level = (room_item(rooms.one(index), index) for rooms in self.cameras)
        parts = (item[name] for item in (tilted, level) for name in ("image", "depth", "mask"))
        return TiltedRoom(sharp["image"], sharp["up"], *parts)

    def within(self, least_deg: float, most_deg: float) -> list[int]:
        """Return the rooms whose camera is tilted by that many degrees, by number."""
        return np.flatnonzero((self.tilt_deg >= least_deg) & (self.tilt_deg <= most_deg)).tolist()
