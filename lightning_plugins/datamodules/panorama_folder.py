"""A folder of photographs as a datamodule: ``Trainer().predict(model, PanoramaFolder("photographs"))``."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_plugins._lightning import LightningDataModule
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import check_panorama, find_panoramas, read_panorama
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
    """Any folder of 2:1 panoramic photographs, or a single one, for ``Trainer.predict``.

    Every file is checked in ``setup``, before anything runs. Resizing is antialiased and reads across the seam and the poles.

    Args:
        folder: an image, or a folder whose images are taken in the order of their names.
        height: rows of the items, in pixels.
        width: columns of the items; twice the height if left out.
        batch_size: photographs in a batch.
        num_workers: processes that decode; 0 decodes in the main process.
        recursive: take the images in the folders within the folder too.

    Raises:
        InputError: if a size or count is out of range; in ``setup``, if an image is missing, unreadable or not 2:1.
    """

    def __init__(
        self,
        folder: str | Path,
        height: int = 128,
        width: int | None = None,
        batch_size: int = 4,
        num_workers: int = 0,
        recursive: bool = False,
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
        self.folder = Path(folder)
        self.height = height
        self.width = width
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.recursive = recursive
        self._images: PanoramaImages | None = None

    def __repr__(self) -> str:
        return (
            f"PanoramaFolder({str(self.folder)!r}, height={self.height}, width={self.width}, batch_size={self.batch_size}, "
            f"num_workers={self.num_workers}, recursive={self.recursive})"
        )

    @property
    def images(self) -> PanoramaImages:
        """The photographs, found and checked on first use."""
        if self._images is None:
            paths = find_panoramas(self.folder, self.recursive)
            for path in paths:
                check_panorama(path)
            self._images = PanoramaImages(paths, self.height, self.width)
        return self._images

    def setup(self, stage: str) -> None:
        """Find and check the photographs."""
        self._images = None
        len(self.images)

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """All photographs, once, in the order of their names."""
        return DataLoader(self.images, batch_size=self.batch_size, num_workers=self.num_workers)
