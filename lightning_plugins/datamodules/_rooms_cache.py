"""Rendered rooms as arrays, in memory or in a folder; the file's name is a hash of all that its content depends on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins.engines import rendering
from lightning_plugins.engines.rendering import RoomDistribution, render_room


@dataclass(frozen=True)
class Rooms:
    """Arrays of n rooms.

    Attributes:
        image: ``(n, H, W, 3)`` uint8.
        depth_m: ``(n, H, W)`` float32, radial.
        mask: ``(n, H, W)`` bool, True where the depth is valid.
    """

    image: np.ndarray
    depth_m: np.ndarray
    mask: np.ndarray


def render_rooms(first_seed: int, count: int, height: int, distribution: RoomDistribution, label: str) -> Rooms:
    """Render the rooms of seeds ``first_seed`` to ``first_seed + count - 1``, with a progress bar."""
    rooms = Rooms(
        np.empty((count, height, 2 * height, 3), np.uint8),
        np.empty((count, height, 2 * height), np.float32),
        np.empty((count, height, 2 * height), bool),
    )
    for i in tqdm(range(count), desc=label, unit="room", leave=False):
        room = render_room(first_seed + i, height, 2 * height, distribution)
        rooms.image[i], rooms.depth_m[i], rooms.mask[i] = room.image, room.depth_m, room.mask
    return rooms


def load_or_render(
    first_seed: int, count: int, height: int, distribution: RoomDistribution, cache: Path | None, label: str
) -> Rooms:
    """Return the rooms, from ``cache`` if they lie there whole; a new or damaged file is written anew.

    Raises:
        InputError: if the folder cannot be written.
    """
    if cache is None:
        return render_rooms(first_seed, count, height, distribution, label)
    path = cache / f"rooms_{count}x{height}_{_fingerprint(first_seed, count, height, distribution)}.npz"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Rooms(file["image"], file["depth_m"], file["mask"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # absent, truncated, or not ours
        pass
    rooms = render_rooms(first_seed, count, height, distribution, label)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, image=rooms.image, depth_m=rooms.depth_m, mask=rooms.mask)
    except OSError as error:
        raise InputError(f"cache {cache} cannot be written ({error.strerror or error}); give another folder or none") from error
    return rooms


def _fingerprint(*options: object) -> str:
    """Return a hash of the options and of the renderer's own source: a changed renderer never meets its old rooms."""
    digest = hashlib.sha256(repr(options).encode())
    for source in sorted(Path(rendering.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
