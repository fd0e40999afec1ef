"""Ray-cast rooms as a 360-degree camera sees them: image, depth in metres, validity mask, tilt; from a seed, by numpy alone."""

from lightning_plugins.engines.rendering.distribution import HELD_OUT_ROOMS, SHAPES, TRAINING_ROOMS, RoomDistribution
from lightning_plugins.engines.rendering.render import RenderedRoom, render_room

__all__ = ["HELD_OUT_ROOMS", "SHAPES", "TRAINING_ROOMS", "RenderedRoom", "RoomDistribution", "render_room"]
