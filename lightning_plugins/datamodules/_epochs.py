"""Loaders whose items are functions of seed, epoch and index alone, and which go on in the middle of an epoch."""

import weakref
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

Item = dict[str, Tensor]


class EpochSampler(DistributedSampler[int]):
    """Yields ``(epoch, index)``, so that what an item looks like is a function of seed, epoch and index alone.

    Being a DistributedSampler, Lightning neither replaces nor wraps it, and calls ``set_epoch``.
    """

    skip = 0  # items of the next epoch that were seen before a checkpoint was written

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        return ((self.epoch, index) for index in islice(super().__iter__(), skip, None))


class ResumableLoader(DataLoader[Item]):
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


class EpochLoaders:
    """The loaders of a data module, and the position in its training epoch.

    Lightning restores a loader's own state too late where a schedule asks for the number of steps (seen in 2.6.6): the loader
    exists by then, and is not built again. The data module's state comes in time.

    Args:
        batch_size: items per batch and process.
        num_workers: processes that load batches.
        seed: of the order of training.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        # Weak: a data module is part of a reference cycle (save_hyperparameters keeps its frame), and a loader that the garbage
        # collector finds in one waits 5 s for each of its workers (seen in torch 2.11).
        self._train_loader: weakref.ref[ResumableLoader] | None = None
        self._position: dict[str, int] | None = None

    def train(self, dataset: Dataset[Item], trainer: Any) -> ResumableLoader:
        """Return a loader in another order each epoch; the first after ``load_state_dict`` begins where the state says."""
        loader = self._loader(dataset, trainer, shuffle=True)
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        self._train_loader = weakref.ref(loader)
        return loader

    def evaluation(self, dataset: Dataset[Item], trainer: Any) -> ResumableLoader:
        """Return a loader in order."""
        return self._loader(dataset, trainer, shuffle=False)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training epoch."""
        loader = self._train_loader() if self._train_loader else None
        return loader.state_dict() if loader is not None else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next training epoch begin there."""
        self._position = state or None

    def _loader(self, dataset: Dataset[Item], trainer: Any, shuffle: bool) -> ResumableLoader:
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=self.seed),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
