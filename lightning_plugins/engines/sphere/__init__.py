"""Geometry of the sphere and of equirectangular images: directions, padding, samplings, resampling, rotation, convolution."""

from lightning_plugins.engines.sphere.band_limit import limit_longitude_band
from lightning_plugins.engines.sphere.convolution import SphericalConv2d
from lightning_plugins.engines.sphere.directions import directions_to_pixels, pixel_directions, solid_angles
from lightning_plugins.engines.sphere.domains import EquirectangularGrid, SpherePoints
from lightning_plugins.engines.sphere.padding import pad_equirectangular
from lightning_plugins.engines.sphere.pose import pose_from_rotation, pose_from_up, rotation_from_pose, up_from_pose
from lightning_plugins.engines.sphere.resampling import Resample, sample_equirectangular
from lightning_plugins.engines.sphere.resizing import resize_equirectangular
from lightning_plugins.engines.sphere.rings import latitude_rings
from lightning_plugins.engines.sphere.rotation import rotate_depth, rotate_equirectangular, rotation_from_up
from lightning_plugins.engines.sphere.sampling import fibonacci_sphere, icosphere
from lightning_plugins.engines.sphere.tiles import rotate_in_tiles
from lightning_plugins.engines.sphere.wrapping import wrap_convolutions

__all__ = [
    "EquirectangularGrid",
    "Resample",
    "SpherePoints",
    "SphericalConv2d",
    "directions_to_pixels",
    "fibonacci_sphere",
    "icosphere",
    "latitude_rings",
    "limit_longitude_band",
    "pad_equirectangular",
    "pixel_directions",
    "pose_from_rotation",
    "pose_from_up",
    "resize_equirectangular",
    "rotate_depth",
    "rotate_equirectangular",
    "rotate_in_tiles",
    "rotation_from_pose",
    "rotation_from_up",
    "sample_equirectangular",
    "solid_angles",
    "up_from_pose",
    "wrap_convolutions",
]
