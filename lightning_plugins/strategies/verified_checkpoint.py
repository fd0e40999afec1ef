"""Checkpoints that are found out when they have changed on the disk: ``Trainer(plugins=[VerifiedCheckpointIO()])``.

A flipped bit in a checkpoint is read by ``torch.load`` without a word: the run goes on with another weight. Here every file
carries a checksum of itself, which is compared before anything is loaded. It is still an ordinary ``.ckpt`` for everybody else.
Files are written whole or not at all, as by ``AtomicCheckpointIO``.

    fit(ckpt_path="steps/step-000000100")

goes on from a step that ``MemoryCheckpoint`` has written to disk, too.

Cost: reading a file twice, the first time at the speed of the disk; while writing, 0.25 s per GB.
"""

import warnings
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from lightning_plugins._lightning import built_for
from lightning_plugins.engines.resilience.disk_archive import check_archive, save_checked
from lightning_plugins.engines.resilience.disk_checkpoint import is_step, read_checkpoint
from lightning_plugins.strategies.atomic_checkpoint import AtomicCheckpointIO


class VerifiedCheckpointIO(AtomicCheckpointIO):
    """Save checkpoints atomically with a checksum, and compare it before loading.

    On local file systems; addresses such as ``s3://`` are left to Lightning's own way, without checksums. Files that have none
    are loaded as ever, the first with a warning.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def __repr__(self) -> str:
        return f"VerifiedCheckpointIO() [{built_for()}]"

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint of a file, or of a folder ``step-...`` that ``MemoryCheckpoint`` has written.

        Args:
            path: file or folder.
            map_location: as for ``torch.load``; a step's tensors come on the CPU.
            weights_only: as for ``torch.load``; a step is always loaded safely.

        Raises:
            DamagedError: in one sentence that names the file, if it is not what was written.
            InputError: for a folder of several steps.
        """
        if "://" not in str(path):
            if is_step(path):
                return read_checkpoint(path, dist.get_rank() if dist.is_available() and dist.is_initialized() else 0)
            if Path(path).is_file() and not check_archive(path) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{path} has no checksum, so it may be damaged; those that VerifiedCheckpointIO saves have one",
                    stacklevel=2,
                )
            if weights_only is not None and Path(path).is_file():  # older Lightnings do not take it
                loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only)
                return loaded
        settings = {} if weights_only is None else {"weights_only": weights_only}
        return super().load_checkpoint(path, map_location=map_location, **settings)

    def _write(self, checkpoint: dict[str, Any], file: IO[bytes]) -> None:
        save_checked(checkpoint, file)
