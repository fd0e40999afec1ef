"""Ray-cast rooms as a LightningDataModule: exact depth without a download, the same rooms for the same seed everywhere."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_plugins._lightning import LightningDataModule
from lightning_plugins._support.errors import InputError
from lightning_plugins.datamodules._rooms_cache import Rooms, load_or_render
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS

# Seeds of the three splits are far apart, so that no split ever renders another's room.
SPLIT_SEED = {"train": 0, "val": 1, "test": 2}


class EpochSampler(DistributedSampler[int]):
    """Yields ``(epoch, index)``, so that what an item looks like is a function of seed, epoch and index alone.

    Being a DistributedSampler, Lightning neither replaces nor wraps it, and calls ``set_epoch``.
    """

    skip = 0  # items of the next epoch that were seen before a checkpoint was written

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        return ((self.epoch, index) for index in islice(super().__iter__(), skip, None))


class ResumableLoader(DataLoader[dict[str, Tensor]]):
    """A DataLoader over an ``EpochSampler`` that can begin in the middle of an epoch."""

    sampler: EpochSampler
    batch_size: int

    seen = 0  # batches of this epoch that were handed out

    def __iter__(self) -> Any:
        self.seen = self.sampler.skip // self.batch_size
        for batch in super().__iter__():
            self.seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch are done; 0 after the last."""
        return {"seen": self.seen % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next epoch begin after the batches that were seen."""
        self.sampler.skip = state["seen"] * self.batch_size


class RoomsDataset(Dataset[dict[str, Tensor]]):
    """Rendered rooms as dicts of ``image``, ``depth``, ``mask`` and ``index``.

    Args:
        rooms: the rendered arrays.
        augment_seed: seed of yaw, mirror and colour; None leaves the rooms as rendered.
    """

    def __init__(self, rooms: Rooms, augment_seed: int | None = None) -> None:
        self.rooms = rooms
        self.augment_seed = augment_seed

    def __len__(self) -> int:
        return len(self.rooms.image)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Tensor]:
        """Return room ``index``, augmented for ``epoch`` when given ``(epoch, index)``.

        ``image`` ``(3, H, W)`` float32 in [0, 1], ``depth`` ``(1, H, W)`` float32 metres, ``mask`` ``(1, H, W)`` bool.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.rooms.image[index].astype(np.float32) / 255
        depth, mask = self.rooms.depth_m[index], self.rooms.mask[index]
        if self.augment_seed is not None:
            image, depth, mask = augment(image, depth, mask, np.random.default_rng((self.augment_seed, epoch, index)))
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            "depth": torch.from_numpy(np.ascontiguousarray(depth))[None],
            "mask": torch.from_numpy(np.ascontiguousarray(mask))[None],
            "index": torch.tensor(index),
        }


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def augment(image: np.ndarray, depth_m: np.ndarray, mask: np.ndarray, generator: np.random.Generator) -> Arrays:
    """Turn by any yaw, mirror every other time, and vary exposure, contrast and colour; depth follows the geometry.

    Args:
        image: ``(H, W, 3)`` float32 in [0, 1].
        depth_m: ``(H, W)``.
        mask: ``(H, W)``.
        generator: the only source of randomness.
    """
    shift = int(generator.integers(image.shape[1]))
    image, depth_m, mask = (np.roll(a, shift, axis=1) for a in (image, depth_m, mask))
    if generator.random() < 0.5:
        image, depth_m, mask = image[:, ::-1], depth_m[:, ::-1], mask[:, ::-1]
    gain = np.exp(generator.normal(0, 0.15)) * np.exp(generator.normal(0, 0.06, 3))
    gamma = np.exp(generator.normal(0, 0.2))
    image = np.clip(image, 1e-4, 1) ** np.float32(gamma) * gain.astype(np.float32)
    return np.clip(image, 0, 1), depth_m, mask


class RenderedRooms(LightningDataModule):
    """Rooms that are ray-cast on the spot; those of validation and test have shapes, densities and textures never trained on.

    Batches are dicts of ``image``, ``depth`` (metres), ``mask`` and ``index``. Order and augmentation are functions of seed,
    epoch and index, so a resumed run sees what it would have seen, also from the middle of an epoch.

    Args:
        train_rooms: number of rooms to train on.
        val_rooms: number of held-out rooms to validate on.
        test_rooms: number of held-out rooms to test on, others than those of validation.
        height: rows of the images; they are twice as wide.
        batch_size: rooms per batch and process.
        seed: of rooms, order and augmentation.
        augment: vary yaw, mirror and colours of the training rooms.
        cache: folder to keep rendered rooms in for the next run; without one they stay in memory.
        num_workers: processes that load batches.

    Raises:
        InputError: for a number that is out of range.
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
        self.save_hyperparameters()
        self.counts = {"train": train_rooms, "val": val_rooms, "test": test_rooms}
        self.height, self.batch_size, self.seed, self.num_workers = height, batch_size, seed, num_workers
        self.augment_seed = seed if augment else None
        self.cache = Path(cache) if cache is not None else None
        self.splits: dict[str, Rooms] = {}
        self._train_loader: ResumableLoader | None = None
        self._position: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage or "", tuple(self.counts))
        for split in wanted:
            self.rooms(split)

    def rooms(self, split: str) -> Rooms:
        """Return the arrays of ``train``, ``val`` or ``test``, rendered on the first call."""
        if split not in self.splits:
            distribution = TRAINING_ROOMS if split == "train" else HELD_OUT_ROOMS
            base = (SPLIT_SEED[split] << 48) + (self.seed << 24)
            self.splits[split] = load_or_render(
                base, self.counts[split], self.height, distribution, self.cache, label=f"Rendering {split} rooms"
            )
        return self.splits[split]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        self._train_loader = self._loader("train", shuffle=True)
        if self._position is not None:
            self._train_loader.load_state_dict(self._position)
            self._position = None
        return self._train_loader

    # Lightning restores a loader's own state too late where a schedule asks for the number of steps (seen in 2.6.6): the loader
    # exists by then, and is not built again. The data module's state comes in time.
    def state_dict(self) -> dict[str, int]:
        """Return the position in the training epoch."""
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training epoch begin there."""
        self._position = state_dict or None

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("test", shuffle=False)

    def evaluation_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return all test rooms in order, whole on every process: for scores that one process computes."""
        return DataLoader(RoomsDataset(self.rooms("test")), batch_size=self.batch_size)

    def _loader(self, split: str, shuffle: bool) -> ResumableLoader:
        dataset = RoomsDataset(self.rooms(split), self.augment_seed if split == "train" else None)
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = EpochSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=self.seed)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
