"""Level photographs under tilts that are drawn from a seed, made so that only the scene gives the tilt away, not the resampling.

A photograph is read once, reduced to three times the height that is asked for, turned by a rotation that is drawn for it, and
kept as bytes. An item reads that in any orientation, at three times the height again, bilinear, and is then reduced. So every
item has been interpolated twice at directions that fall anywhere between the pixels, the level one too: were the photograph kept
as it is, the level image would be read at its very pixels and be sharper than all others. Three times the height keeps nearly
all of the detail that reducing the photograph alone would leave, twice the height would lose half of the finest.

Cost: 36 bilinear reads for each pixel of an item, and as many again for its level image; 54 height^2 bytes of memory for a
photograph, 0.9 MB at 128 rows.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_plugins._support.images import read_panorama, resize_panorama
from lightning_plugins.datamodules._epochs import Item
from lightning_plugins.datamodules._tilts import draw_camera_to_level
from lightning_plugins.datamodules._views import draw_view
from lightning_plugins.engines.sphere import resize_equirectangular, rotate_equirectangular

KEPT_SCALE = 3
# Enters every seed, so that the splits draw apart.
SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}


class TiltedPhotographs(Dataset[Item]):
    """Items ``image`` and, if asked for, ``level`` (float32 ``(3, height, 2 height)`` in [0, 1]), ``up`` (float32 ``(3,)``),
    ``index``.

    Photograph ``i`` gives the items ``i * tilts_per_image`` and following. An item is a function of seed, split and index, and
    in training of the epoch.

    Args:
        paths: the photographs.
        split: ``train``, ``val`` or ``test``.
        height: rows of the items.
        tilt: a distribution of ``_tilts``.
        tilts_per_image: items of a photograph.
        seed: of tilts and views.
        augment: vary yaw, mirror and colours of the training items.
        with_level: give the level image, too.
    """

    def __init__(
        self,
        paths: list[Path],
        split: str,
        height: int,
        tilt: str,
        tilts_per_image: int,
        seed: int,
        augment: bool,
        with_level: bool,
    ) -> None:
        self.split, self.height, self.tilt, self.tilts_per_image = split, height, tilt, tilts_per_image
        self.seed, self.augment, self.with_level = seed, augment and split == "train", with_level
        generators = [np.random.default_rng((seed, SPLIT_NUMBER[split], i)) for i in range(len(paths))]
        self.kept_from_level = np.array([draw_camera_to_level("sphere", generator) for generator in generators])
        self.kept = self._read(paths)

    def __len__(self) -> int:
        return len(self.kept) * self.tilts_per_image

    def __getitem__(self, key: tuple[int, int] | int) -> Item:
        """Return item ``index``, of ``epoch`` when given ``(epoch, index)``."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = np.random.default_rng((self.seed, SPLIT_NUMBER[self.split], epoch if self.split == "train" else 0, index))
        level_from_camera = draw_camera_to_level(self.tilt, generator)
        up = level_from_camera[2]
        orientations = {"image": level_from_camera} | ({"level": np.eye(3)} if self.with_level else {})
        images = {name: self._seen(index // self.tilts_per_image, orientation) for name, orientation in orientations.items()}
        if self.augment:
            view = draw_view(2 * self.height, generator)
            up = view.turn_direction(up)
            images = {name: view.look(image) for name, image in images.items()}
        item = {name: torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for name, image in images.items()}
        return item | {"up": torch.from_numpy(up.astype(np.float32)), "index": torch.tensor(index)}

    def _seen(self, photograph: int, level_from_camera: np.ndarray) -> np.ndarray:
        """Return what a camera sees of a photograph, ``(height, 2 height, 3)``."""
        camera_from_kept = torch.from_numpy((self.kept_from_level[photograph] @ level_from_camera).T).float()
        turned = rotate_equirectangular(self.kept[photograph][None].float() / 255, camera_from_kept)
        return resize_equirectangular(turned, self.height, 2 * self.height)[0].permute(1, 2, 0).numpy()

    def _read(self, paths: list[Path]) -> Tensor:
        """Return the photographs as they are kept, ``(n, 3, KEPT_SCALE height, 2 KEPT_SCALE height)`` uint8."""
        height = KEPT_SCALE * self.height
        kept = torch.empty(len(paths), 3, height, 2 * height, dtype=torch.uint8)
        small = 0
        for i, path in enumerate(tqdm(paths, desc=f"Reading {self.split} photographs", unit="photograph", leave=False)):
            photograph = read_panorama(path)
            small += photograph.shape[0] < self.height
            level = torch.tensor(resize_panorama(photograph, height, 2 * height)).permute(2, 0, 1)[None].float()
            turned = rotate_equirectangular(level, torch.from_numpy(self.kept_from_level[i]).float(), "bicubic")
            kept[i] = turned[0].round().clamp(0, 255).byte()
        if small:
            warnings.warn(
                f"{small} of {len(paths)} {self.split} photographs have fewer than {self.height} rows and are blurred beside the "
                f"others; lower height, or leave them out",
                stacklevel=2,
            )
        return kept
