"""Rooms for the tests of this folder: level ones, tilted in the trainer's own hook by what only their number decides."""

import math

import torch

from lightning_plugins import RenderedRooms
from lightning_plugins.engines.sphere import rotate_equirectangular, rotation_from_up


def up_vectors(seeds, max_tilt_deg=20.0):
    """Unit vectors ``(N, 3)`` within a cone about +z, one for each number."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    tilt, azimuth = torch.stack([torch.rand(2, generator=generator, dtype=torch.float64) for generator in generators]).T
    tilt, azimuth = math.radians(max_tilt_deg) * tilt.sqrt(), 2 * math.pi * azimuth
    return torch.stack([tilt.sin() * azimuth.cos(), tilt.sin() * azimuth.sin(), tilt.cos()], dim=-1).float()


def tilted(level, up):
    """The image that a camera with that up-vector takes of what stands level in ``level``."""
    return rotate_equirectangular(level, rotation_from_up(up).mT, "bicubic").clamp(0, 1)


class TiltedRooms(RenderedRooms):
    """Batches of ``image``, ``up`` and, unless it is told not to, ``level``."""

    gives_level = True

    def on_after_batch_transfer(self, batch, dataloader_idx):
        level = batch["image"]
        up = up_vectors(batch["index"]).to(level)
        made = {"image": tilted(level, up), "up": up}
        return {**made, "level": level} if self.gives_level else made


def tiny_rooms(**options):
    return TiltedRooms(**{"train_rooms": 8, "val_rooms": 2, "test_rooms": 2, "height": 32, "batch_size": 4, "seed": 3, **options})
