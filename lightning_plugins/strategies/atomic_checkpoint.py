"""Checkpoints that appear whole or not at all, as a plugin: ``Trainer(plugins=[AtomicCheckpointIO()])``.

Lightning's own TorchCheckpointIO holds the whole checkpoint in memory, writes it to the system's temporary folder and moves it
over the old one: between two file systems a move is a copy, so a disk that fills on the way has destroyed the good checkpoint
before it is noticed. Here torch writes straight to a temporary name beside the old file, which is renamed over it once it is on
the disk.

    write to .NAME.XXXX.part  ->  fsync  ->  rename to NAME  ->  fsync of the folder

Cost: one fsync a checkpoint, no copy in memory, and room for one checkpoint more than are kept.
"""

from pathlib import Path
from typing import IO, Any

import torch

from lightning_plugins._lightning import TorchCheckpointIO, built_for
from lightning_plugins._support.atomic import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints atomically on a local file system; addresses such as ``s3://`` are left to Lightning's own way.

    Reading and removing are Lightning's: a file is removed in one step already.
    """

    def __repr__(self) -> str:
        return f"AtomicCheckpointIO() [{built_for()}]"

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, making its folder.

        Raises:
            OSError: as the file system says, or torch's RuntimeError for it; ``path`` then holds what it held before.
            TypeError: if ``storage_options`` are given.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            self._write(checkpoint, file)

    def _write(self, checkpoint: dict[str, Any], file: IO[bytes]) -> None:
        torch.save(checkpoint, file)
