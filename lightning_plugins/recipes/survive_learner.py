"""What the recipe ``survive`` trains: a small net with everything that a run may lose when it is killed.

Ten digits of seven segments, shifted, faded and noisy, drawn anew whenever a sample is fetched, from torch's and Python's
generators; dropout draws from torch's; batch normalization has statistics of every process's own; the learning rate follows a
cycle over the whole training. So a run that goes on with any of these elsewhere than it was has other losses from then on.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lightning_plugins._lightning import LightningModule

BATCH = 32  # of each process
STEPS_PER_EPOCH = 40
SIDE = 16  # pixels
NOISE = 0.25
FARTHEST_SHIFT = 2  # pixels
LEARNING_RATE = 3e-3

Batch = tuple[Tensor, Tensor, Tensor]  # images, digits, numbers of the samples

# Rows and columns of the segments a to g, and which of them make 0 to 9.
_SEGMENTS = {
    "a": (slice(3, 4), slice(5, 11)),
    "b": (slice(4, 8), slice(10, 11)),
    "c": (slice(8, 12), slice(10, 11)),
    "d": (slice(12, 13), slice(5, 11)),
    "e": (slice(8, 12), slice(5, 6)),
    "f": (slice(4, 8), slice(5, 6)),
    "g": (slice(7, 8), slice(5, 11)),
}
_DIGITS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


class Digits(Dataset[tuple[Tensor, int, int]]):
    """Noisy digits: an image ``(1, SIDE, SIDE)``, its digit, and its own number.

    Args:
        count: of samples.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.plain = torch.zeros(len(_DIGITS), SIDE, SIDE)
        for image, segments in zip(self.plain, _DIGITS, strict=True):
            for segment in segments:
                image[_SEGMENTS[segment]] = 1.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        digit = index % len(_DIGITS)
        shift = torch.randint(-FARTHEST_SHIFT, FARTHEST_SHIFT + 1, (2,)).tolist()
        image = random.uniform(0.5, 1.0) * self.plain[digit].roll(shift, (0, 1))
        return (image + NOISE * torch.randn(SIDE, SIDE))[None], digit, index


class Learner(LightningModule):
    """Tells digits from each other; every process has its share of a batch.

    Args:
        processes: that train together; the data set is as large as they need for ``STEPS_PER_EPOCH`` steps, so that no sample is
            seen twice in an epoch.
        epochs: over which the learning rate goes up and down once.
    """

    def __init__(self, processes: int, epochs: int) -> None:
        super().__init__()
        self.samples, self.steps = processes * BATCH * STEPS_PER_EPOCH, epochs * STEPS_PER_EPOCH
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * (SIDE // 4) ** 2, 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, len(_DIGITS)),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits, _ = batch
        return functional.cross_entropy(self.network(images), digits)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int, int]]:
        return DataLoader(Digits(self.samples), batch_size=BATCH, shuffle=True)
