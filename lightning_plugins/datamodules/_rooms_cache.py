"""Rendered rooms as arrays, in memory or in a folder; the file's name is a hash of all that its content depends on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from tqdm.auto import tqdm

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins.datamodules import _tilts
from lightning_plugins.datamodules._tilts import draw_camera_to_level
from lightning_plugins.engines import rendering, sphere
from lightning_plugins.engines.rendering import RoomDistribution, render_room
from lightning_plugins.engines.rendering.render import TILT_STREAM, stream
from lightning_plugins.engines.sphere import resize_equirectangular, rotate_equirectangular, rotation_from_up


@dataclass(frozen=True)
class Rooms:
    """Arrays of n rooms, or of one room, without their first axis.

    Attributes:
        image: ``(n, H, W, 3)`` uint8.
        depth_m: ``(n, H, W)`` float32, radial.
        mask: ``(n, H, W)`` bool, True where the depth is valid.
        up: ``(n, 3)`` float32, the true vertical in the camera's frame; None of rooms without tilt.
        level: ``(n, H, W, 3)`` uint8, the rooms as ``rotation_from_up(up)`` levels them; None where it was not asked for.
    """

    image: np.ndarray
    depth_m: np.ndarray
    mask: np.ndarray
    up: np.ndarray | None = None
    level: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def one(self, index: int) -> "Rooms":
        """Return one room."""
        return Rooms(**{name: array[index] for name, array in self.arrays().items()})


@dataclass(frozen=True)
class RoomKind:
    """What is rendered from a seed.

    Attributes:
        height: rows of the images, half of their columns.
        distribution: what rooms there are.
        tilt: how their cameras are tilted, by the names of ``_tilts``; None leaves them level.
        with_level: give what the level camera sees, too, and turn the image out of it.
    """

    height: int
    distribution: RoomDistribution
    tilt: str | None = None
    with_level: bool = False

    def render(self, seed: int) -> Rooms:
        """Render the room of a seed; its tilt is a function of the seed, too."""
        size = self.height, 2 * self.height
        if self.tilt is None:
            room = render_room(seed, *size, self.distribution)
            return Rooms(room.image, room.depth_m, room.mask)
        camera_to_level = draw_camera_to_level(self.tilt, stream(seed, TILT_STREAM))
        room = render_room(seed, *size, self.distribution, camera_to_level)
        up = room.up.astype(np.float32)
        image, level = self._pair(seed, up) if self.with_level else (room.image, None)
        return Rooms(image, room.depth_m, room.mask, up, level)

    def _pair(self, seed: int, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the room's image in the tilted camera and in the level one.

        Of one photograph, for two have noise of their own, by which they differ more than by all that levelling blurs. It has
        twice the height, and both are reduced, so that turning it hardly blurs: the tilted image is as sharp as a camera's.
        """
        double = 2 * self.height
        photograph = render_room(seed, double, 2 * double, self.distribution, np.eye(3)).image
        level = torch.from_numpy(photograph).permute(2, 0, 1)[None].float()
        tilted = rotate_equirectangular(level, rotation_from_up(torch.from_numpy(up)).mT, "bicubic").clamp(0, 255)
        pair = resize_equirectangular(torch.cat([tilted, level]), self.height, 2 * self.height).round().byte()
        image, reduced = pair.permute(0, 2, 3, 1).contiguous().numpy()
        return image, reduced


def render_rooms(first_seed: int, count: int, kind: RoomKind, label: str) -> Rooms:
    """Render the rooms of seeds ``first_seed`` to ``first_seed + count - 1``, with a progress bar."""
    arrays: dict[str, np.ndarray] = {}
    for i in tqdm(range(count), desc=label, unit="room", leave=False):
        for name, array in kind.render(first_seed + i).arrays().items():
            arrays.setdefault(name, np.empty((count, *array.shape), array.dtype))[i] = array
    return Rooms(**arrays)


def load_or_render(first_seed: int, count: int, kind: RoomKind, cache: Path | None, label: str) -> Rooms:
    """Return the rooms, from ``cache`` if they lie there whole; a new or damaged file is written anew.

    Raises:
        InputError: if the folder cannot be written.
    """
    if cache is None:
        return render_rooms(first_seed, count, kind, label)
    path = cache / f"rooms_{count}x{kind.height}_{_fingerprint(first_seed, count, kind)}.npz"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Rooms(**file)
    except (OSError, ValueError, TypeError, EOFError, BadZipFile):  # absent, truncated, or not ours
        pass
    rooms = render_rooms(first_seed, count, kind, label)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **rooms.arrays())  # type: ignore[arg-type]  # none is called allow_pickle
    except OSError as error:
        raise InputError(f"cache {cache} cannot be written ({error.strerror or error}); give another folder or none") from error
    return rooms


def _fingerprint(*options: object) -> str:
    """Return a hash of the options and of the source that renders and turns: when it changes, it never meets its old rooms."""
    digest = hashlib.sha256(repr(options).encode())
    engines = [source for engine in (rendering, sphere) for source in sorted(Path(str(engine.__file__)).parent.glob("*.py"))]
    for source in [*engines, Path(_tilts.__file__), Path(__file__)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
