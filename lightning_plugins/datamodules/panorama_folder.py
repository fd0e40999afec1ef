"""A folder of photographs as a datamodule: ``Trainer().predict(model, PanoramaFolder("photographs"))``, and, tilted at random,
``Trainer().fit(model, PanoramaFolder("photographs", tilt="small"))``."""

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_plugins._lightning import LightningDataModule
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import check_panorama, find_panoramas, read_panorama
from lightning_plugins.datamodules._epochs import EpochLoaders
from lightning_plugins.datamodules._photographs import TiltedPhotographs
from lightning_plugins.datamodules._tilts import check_tilt
from lightning_plugins.engines.sphere import resize_equirectangular


class PanoramaImages(Dataset[dict[str, Any]]):
    """Photographs by index, decoded when asked for.

    An item is a dict of ``image`` (float32 ``(3, height, width)`` in [0, 1]), ``index``, ``path`` and ``original_size``
    (int64 ``(2,)``, the photograph's own height and width in pixels).
    """

    def __init__(self, paths: list[Path], height: int, width: int) -> None:
        self.paths = paths
        self.height = height
        self.width = width

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photograph = read_panorama(self.paths[index])
        # Channel by channel: a large photograph takes four times its memory as floats.
        channels = torch.from_numpy(photograph).permute(2, 0, 1)[:, None, None]
        image: Tensor = torch.cat([resize_equirectangular(one.float() / 255, self.height, self.width)[0] for one in channels])
        original_size = torch.tensor(photograph.shape[:2])
        return {"image": image, "index": index, "path": str(self.paths[index]), "original_size": original_size}


class PanoramaFolder(LightningDataModule):
    """Any folder of 2:1 panoramic photographs, or a single one, for ``Trainer.predict``; level ones also for training upright.

    For predicting, every file is checked in ``setup``, before anything runs. Resizing is antialiased and reads across the seam
    and the poles.

    With ``tilt`` the photographs, taken as level, are turned by random tilts: batches are dicts of ``image`` (tilted), ``up``
    (the true vertical in the image's frame: unit vectors, x forward, y left, z up) and ``index``. A photograph belongs to one
    of training, validation and test. Training sees it under new tilts in each epoch, the others under fixed ones. All is a
    function of seed, epoch and index, so a resumed run sees what it would have seen, also from the middle of an epoch. The
    photographs are read in ``setup`` and kept in memory, 54 height^2 bytes each; for items as sharp as they can be they should
    have three times as many rows as these, or more.

    Args:
        folder: an image, or a folder whose images are taken in the order of their names.
        height: rows of the items, in pixels.
        width: columns of the items; twice the height if left out.
        batch_size: items in a batch.
        num_workers: processes that decode and turn; 0 does it in the main process.
        recursive: take the images in the folders within the folder too.
        tilt: ``small`` (within 20 degrees), ``sphere``, ``mixed`` (half and half), ``hand_held`` (a few degrees),
            ``whole_degrees`` or ``cone:ANGLE``.
        evaluation_tilt: another one for validation and test; ``tilt`` if left out.
        with_level: batches hold ``level``, too: the photograph that levelling ``image`` by ``up`` should give.
        augment: vary yaw, mirror and colours in training.
        tilts_per_image: items of each photograph in an epoch.
        val_share: share of the photographs that validate; 1 photograph at least, none at 0.
        test_share: share of the photographs that test; 1 of it tests on them all.
        seed: of splits, tilts, order and augmentation.

    Raises:
        InputError: if a size, count or share is out of range, or a tilt unknown; in ``setup``, if an image is missing, unreadable
            or not 2:1, or a split has no photograph.
    """

    def __init__(
        self,
        folder: str | Path,
        height: int = 128,
        width: int | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        recursive: bool = False,
        tilt: str | None = None,
        evaluation_tilt: str | None = None,
        with_level: bool = False,
        augment: bool = True,
        tilts_per_image: int = 1,
        val_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = 2 * height if width is None else width
        if height < 2 or width != 2 * height:
            raise InputError(
                f"height and width must be 2 or more rows and twice as many columns, got {height} and {width}; leave width out"
            )
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}; 4 is a good start")
        if num_workers < 0:
            raise InputError(f"num_workers must be 0 or more, got {num_workers}; 0 decodes in the main process")
        if tilts_per_image < 1:
            raise InputError(f"tilts_per_image must be 1 or more, got {tilts_per_image}; 1 shows each photograph once an epoch")
        if not (val_share >= 0 and test_share >= 0 and val_share + test_share <= 1):
            raise InputError(
                f"val_share and test_share must be 0 or more and 1 or less together, got {val_share} and {test_share}; 0.1 each "
                f"leave 80 % to train on"
            )
        if not 0 <= seed < 2**31:
            raise InputError(f"seed must be from 0 to 2**31 - 1, got {seed}")
        if tilt is None and (evaluation_tilt is not None or with_level):
            raise InputError("evaluation_tilt and with_level need a tilt, got none; give tilt='small'")
        self.folder = Path(folder)
        self.height = height
        self.width = width
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.recursive = recursive
        self.tilt = None if tilt is None else check_tilt(tilt)
        self.evaluation_tilt = self.tilt if evaluation_tilt is None else check_tilt(evaluation_tilt)
        self.with_level = with_level
        self.augment = augment
        self.tilts_per_image = tilts_per_image
        self.val_share = val_share
        self.test_share = test_share
        self.seed = seed
        self.loaders = EpochLoaders(batch_size, num_workers, seed)
        self._images: PanoramaImages | None = None
        self._photographs: dict[str, TiltedPhotographs] = {}

    def __repr__(self) -> str:
        names = list(signature(type(self)).parameters)[1:]
        shown = names if self.tilt is not None else names[: names.index("tilt")]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__name__}({str(self.folder)!r}, {settings})"

    # Lightning's builds the loaders to describe them, which reads every photograph.
    __str__ = __repr__

    @property
    def images(self) -> PanoramaImages:
        """The photographs, found and checked on first use."""
        if self._images is None:
            paths = find_panoramas(self.folder, self.recursive)
            for path in paths:
                check_panorama(path)
            self._images = PanoramaImages(paths, self.height, self.width)
        return self._images

    def split_paths(self, split: str) -> list[Path]:
        """Return the photographs of ``train``, ``val`` or ``test``, drawn by the seed from those in the folder.

        Raises:
            InputError: if there is none for it.
        """
        paths = find_panoramas(self.folder, self.recursive)
        order = np.random.default_rng(self.seed).permutation(len(paths))
        val, test = (max(1, round(share * len(paths))) if share else 0 for share in (self.val_share, self.test_share))
        test = min(test, len(paths) - val)
        bounds = {"val": (0, val), "test": (val, val + test), "train": (val + test, len(paths))}[split]
        if bounds[0] >= bounds[1]:
            raise InputError(
                f"of the {len(paths)} photographs in {self.folder} none is left for {split}: val_share {self.val_share} and "
                f"test_share {self.test_share} take {val} and {test}; give more photographs or other shares"
            )
        return [paths[i] for i in sorted(order[slice(*bounds)])]

    def photographs(self, split: str) -> TiltedPhotographs:
        """Return the tilted photographs of ``train``, ``val`` or ``test``, read on the first call.

        Raises:
            InputError: without a tilt, without photographs, or if one cannot be read.
        """
        tilt = self.tilt if split == "train" else self.evaluation_tilt
        if tilt is None:
            raise InputError(f"{self!r} is for predicting: training, validation and test need a tilt; give tilt='small'")
        if split not in self._photographs:
            options = (self.tilts_per_image, self.seed, self.augment, self.with_level)
            self._photographs[split] = TiltedPhotographs(self.split_paths(split), split, self.height, tilt, *options)
        return self._photographs[split]

    def setup(self, stage: str) -> None:
        """Find and check the photographs of predicting; read those of the other stages."""
        if stage == "predict":
            self._images = None
            len(self.images)
        for split in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if split != "val" or self.validates:
                self.photographs(split)

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.val_share > 0

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The training photographs under new tilts in each epoch."""
        return self.loaders.train(self.photographs("train"), self.trainer)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """The validation photographs under their fixed tilts; nothing at a ``val_share`` of 0."""
        return self.loaders.evaluation(self.photographs("val"), self.trainer) if self.validates else []

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """The test photographs under their fixed tilts."""
        return self.loaders.evaluation(self.photographs("test"), self.trainer)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All photographs, once, in the order of their names."""
        return DataLoader(self.images, batch_size=self.batch_size, num_workers=self.num_workers)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training epoch."""
        return self.loaders.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training epoch begin there."""
        self.loaders.load_state_dict(state_dict)
