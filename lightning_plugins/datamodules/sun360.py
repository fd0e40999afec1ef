"""SUN360's photographs as they are used for upright adjustment: ``Trainer().fit(model, SUN360("SUN360", tilt="sphere"))``.

Data set: Xiao, Ehinger, Oliva, Torralba, "Recognizing scene viewpoint using panoramic place representation", CVPR 2012:
panoramas from the Internet, taken as level. The layout is that of the copy with which the published errors of up were measured
(Jung, Cho, Kwon, ICIP 2020; 25,000, 5,000 and 4,260 photographs):

    SUN360/train/NNNNNN.jpg    SUN360/val/NNNNNN.jpg    SUN360/test/NNNNNN.jpg

Its tilts were drawn as ``whole_degrees`` describes. The rotated images themselves were never published: tilts come from our seed.
"""

from pathlib import Path

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import find_panoramas
from lightning_plugins.datamodules.panorama_folder import PanoramaFolder


class SUN360(PanoramaFolder):
    """The photographs of SUN360 under random tilts, in its own splits; batches as of ``PanoramaFolder`` with a tilt.

    Nothing is downloaded: the data set is given out by its authors on request. A split is looked for when it is used, so the test
    photographs alone are enough for a test.

    Args:
        folder: the folder that holds ``train``, ``val`` and ``test``.
        height: rows of the items, in pixels; they are twice as wide. Photographs take 54 height^2 bytes of memory each: all of
            ``train`` 22 GB at 128 rows, 12 GB at 96.
        batch_size: items in a batch.
        num_workers: processes that turn; 0 does it in the main process.
        tilt: ``small`` (within 20 degrees), ``sphere``, ``mixed``, ``hand_held``, ``whole_degrees`` (the published protocol)
            or ``cone:ANGLE``.
        evaluation_tilt: another one for validation and test; ``tilt`` if left out.
        with_level: batches hold ``level``, too: the photograph that levelling ``image`` by ``up`` should give.
        augment: vary yaw, mirror and colours in training.
        tilts_per_image: items of each photograph in an epoch.
        seed: of tilts, order and augmentation.

    Raises:
        InputError: if a number is out of range, or a tilt unknown; in ``setup``, if a split's folder is missing or empty.
    """

    def __init__(
        self,
        folder: str | Path,
        height: int = 128,
        batch_size: int = 4,
        num_workers: int = 0,
        tilt: str = "small",
        evaluation_tilt: str | None = None,
        with_level: bool = False,
        augment: bool = True,
        tilts_per_image: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            folder,
            height,
            batch_size=batch_size,
            num_workers=num_workers,
            recursive=True,
            tilt=tilt,
            evaluation_tilt=evaluation_tilt,
            with_level=with_level,
            augment=augment,
            tilts_per_image=tilts_per_image,
            seed=seed,
        )

    def split_paths(self, split: str) -> list[Path]:
        """Return the photographs of ``train``, ``val`` or ``test``.

        Raises:
            InputError: if the split's folder is missing or empty.
        """
        if not (self.folder / split).is_dir():
            raise InputError(
                f"{self.folder} holds no folder {split!r}; SUN360 is expected as train/, val/ and test/ with photographs "
                f"NNNNNN.jpg in them: ask its authors for it (nothing is downloaded), and give the folder above the three"
            )
        return find_panoramas(self.folder / split)
