"""Ray-cast rooms as a LightningDataModule: exact depth without a download, the same rooms for the same seed everywhere."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_plugins._lightning import LightningDataModule
from lightning_plugins._support.errors import InputError
from lightning_plugins.datamodules._epochs import EpochLoaders, Item
from lightning_plugins.datamodules._rooms_cache import RoomKind, Rooms, load_or_render
from lightning_plugins.datamodules._tilts import check_tilt
from lightning_plugins.datamodules._views import View, draw_view
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS

# Seeds of the three splits are far apart, so that no split ever renders another's room.
SPLIT_SEED = {"train": 0, "val": 1, "test": 2}


class RoomsDataset(Dataset[Item]):
    """Rendered rooms as dicts of ``image``, ``depth``, ``mask`` and ``index``, and of ``up`` and ``level`` where they have them.

    Args:
        rooms: the rendered arrays.
        augment_seed: seed of yaw, mirror and colour; None leaves the rooms as rendered.
    """

    def __init__(self, rooms: Rooms, augment_seed: int | None = None) -> None:
        self.rooms = rooms
        self.augment_seed = augment_seed

    def __len__(self) -> int:
        return len(self.rooms.image)

    def __getitem__(self, key: tuple[int, int] | int) -> Item:
        """Return room ``index``, augmented for ``epoch`` when given ``(epoch, index)``.

        ``image`` and ``level`` ``(3, H, W)`` float32 in [0, 1], ``depth`` ``(1, H, W)`` float32 metres, ``mask`` ``(1, H, W)``
        bool, ``up`` ``(3,)`` float32.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return room_item(self.rooms.one(index), index, _view(self.rooms.image.shape[2], self.augment_seed, epoch, index))


class FreshRooms(Dataset[Item]):
    """Rooms that are rendered when they are asked for, others in each epoch; those of epoch 0 are the fixed ones.

    Args:
        first_seed: seed of the first room of epoch 0; every room has a seed of its own.
        count: rooms of an epoch.
        kind: what is rendered.
        augment_seed: as in ``RoomsDataset``.
    """

    def __init__(self, first_seed: int, count: int, kind: RoomKind, augment_seed: int | None = None) -> None:
        self.first_seed, self.count, self.kind, self.augment_seed = first_seed, count, kind, augment_seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> Item:
        """Return room ``index`` of ``epoch``, as ``RoomsDataset`` does."""
        epoch, index = key
        room = self.kind.render(self.first_seed + epoch * self.count + index)
        return room_item(room, index, _view(2 * self.kind.height, self.augment_seed, epoch, index))


def _view(width: int, seed: int | None, epoch: int, index: int) -> View | None:
    return None if seed is None else draw_view(width, np.random.default_rng((seed, epoch, index)))


def room_item(room: Rooms, index: int, view: View | None = None) -> Item:
    """Return one room as tensors, looked at anew where there is a view."""
    images = {"image": room.image, "level": room.level}
    planes = {"depth": room.depth_m, "mask": room.mask}
    up = room.up
    floats = {name: image.astype(np.float32) / 255 for name, image in images.items() if image is not None}
    if view is not None:
        floats = {name: view.look(image) for name, image in floats.items()}
        planes = {name: view.turn(plane) for name, plane in planes.items()}
        up = None if up is None else view.turn_direction(up)
    item = {name: torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for name, image in floats.items()}
    item |= {name: torch.from_numpy(np.ascontiguousarray(plane))[None] for name, plane in planes.items()}
    if up is not None:
        item["up"] = torch.from_numpy(up)
    return item | {"index": torch.tensor(index)}


class RenderedRooms(LightningDataModule):
    """Rooms that are ray-cast on the spot; those of validation and test have shapes, densities and textures never trained on.

    Batches are dicts of ``image``, ``depth`` (metres), ``mask`` and ``index``. Order and augmentation are functions of seed,
    epoch and index, so a resumed run sees what it would have seen, also from the middle of an epoch.

    With ``tilt`` the cameras are tilted, each room's by its seed, and batches hold ``up``, the true vertical in the image's frame
    (unit vectors, x forward, y left, z up). The images are rendered tilted, so that no interpolation gives the tilt away.
    ``with_level`` they cannot be: image and level twin are one photograph, rendered level at twice the height, turned there
    (bicubic) for the image, and reduced. So they share their noise, and the image is as sharp as a camera's.

    Args:
        train_rooms: number of rooms to train on, in each epoch.
        val_rooms: number of held-out rooms to validate on.
        test_rooms: number of held-out rooms to test on, others than those of validation.
        height: rows of the images; they are twice as wide.
        batch_size: rooms per batch and process.
        seed: of rooms, tilts, order and augmentation.
        augment: vary yaw, mirror and colours of the training rooms.
        cache: folder to keep rendered rooms in for the next run; without one they stay in memory.
        num_workers: processes that load batches.
        tilt: ``small`` (within 20 degrees), ``sphere``, ``mixed`` (half and half), ``hand_held`` (a few degrees),
            ``whole_degrees`` or ``cone:ANGLE``.
        with_level: batches hold ``level``, too: the image that levelling ``image`` by ``up`` should give, with the same sensor
            noise. A room then costs a second rendering, of four times the pixels, which is turned and reduced.
        fresh_rooms: render new training rooms in each epoch, in the processes that load batches, instead of one set before
            training. Each item then costs a rendering, or what ``with_level`` says.

    Raises:
        InputError: for a number that is out of range, an unknown tilt, or ``with_level`` without a tilt.
    """

    def __init__(
        self,
        train_rooms: int = 800,
        val_rooms: int = 32,
        test_rooms: int = 128,
        height: int = 64,
        batch_size: int = 8,
        seed: int = 0,
        augment: bool = True,
        cache: str | None = None,
        num_workers: int = 0,
        tilt: str | None = None,
        with_level: bool = False,
        fresh_rooms: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (
            ("train_rooms", train_rooms),
            ("val_rooms", val_rooms),
            ("test_rooms", test_rooms),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")
        if height < 32 or height % 32:
            raise InputError(
                f"height must be a multiple of 32 and at least 32 rows, got {height}; 64 trains within minutes on a CPU"
            )
        if num_workers < 0:
            raise InputError(f"num_workers must be 0 or more, got {num_workers}; 0 loads in the training process")
        if not 0 <= seed < 2**31:
            raise InputError(f"seed must be from 0 to 2**31 - 1, got {seed}")
        if with_level and tilt is None:
            raise InputError("with_level needs a tilt, got none: without one the images are level themselves; give tilt='small'")
        self.tilt = None if tilt is None else check_tilt(tilt)
        self.save_hyperparameters()
        self.counts = {"train": train_rooms, "val": val_rooms, "test": test_rooms}
        self.height, self.batch_size, self.seed = height, batch_size, seed
        self.with_level, self.fresh_rooms = with_level, fresh_rooms
        self.augment_seed = seed if augment else None
        self.cache = Path(cache) if cache is not None else None
        self.splits: dict[str, Rooms] = {}
        self.loaders = EpochLoaders(batch_size, num_workers, seed)

    def setup(self, stage: str | None = None) -> None:
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", tuple(self.counts))
        for split in wanted:
            if not (split == "train" and self.fresh_rooms):
                self.rooms(split)

    def rooms(self, split: str) -> Rooms:
        """Return the arrays of ``train``, ``val`` or ``test``, rendered on the first call; of fresh rooms, epoch 0."""
        if split not in self.splits:
            self.splits[split] = load_or_render(
                self._first_seed(split), self.counts[split], self._kind(split), self.cache, label=f"Rendering {split} rooms"
            )
        return self.splits[split]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        dataset: Dataset[Item]
        if self.fresh_rooms:
            dataset = FreshRooms(self._first_seed("train"), self.counts["train"], self._kind("train"), self.augment_seed)
        else:
            dataset = RoomsDataset(self.rooms("train"), self.augment_seed)
        return self.loaders.train(dataset, self.trainer)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training epoch."""
        return self.loaders.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training epoch begin there."""
        self.loaders.load_state_dict(state_dict)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loaders.evaluation(RoomsDataset(self.rooms("val")), self.trainer)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.loaders.evaluation(RoomsDataset(self.rooms("test")), self.trainer)

    def evaluation_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return all test rooms in order, whole on every process: for scores that one process computes."""
        return DataLoader(RoomsDataset(self.rooms("test")), batch_size=self.batch_size)

    def _kind(self, split: str) -> RoomKind:
        distribution = TRAINING_ROOMS if split == "train" else HELD_OUT_ROOMS
        return RoomKind(self.height, distribution, self.tilt, self.with_level)

    def _first_seed(self, split: str) -> int:
        return (SPLIT_SEED[split] << 48) + (self.seed << 24)
