"""A training with everything that a resumed run can get wrong, and all that is compared of it.

The net has dropout and batch normalization; the data set draws from all three generators of random numbers; metrics gather over
the epoch, and the mean of the epoch's losses decides over the learning rate.
"""

import io
import random

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

from lightning_plugins._lightning import Callback, LightningModule, Trainer, seed_everything
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.callbacks.memory_checkpoint._seams import OpenedLoop

SAMPLES, BATCH, EPOCHS = 24, 4, 3


class Noisy(Dataset):
    """Samples that are never twice the same."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.randn(4) + random.random() + float(np.random.rand())  # noqa: NPY002 - as users' data sets do
        return torch.full((4,), index / SAMPLES) + 0.1 * noise, torch.tensor(index)


class Regression(LightningModule):
    """Learns the sum; keeps the samples that it has seen."""

    def __init__(self, workers=0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.mean = MeanMetric()
        self.register_buffer("batches", torch.zeros(()), persistent=False)
        self.workers = workers
        self.seen = []

    def on_train_epoch_start(self):
        torch.rand(3)  # is not called again in an epoch that is resumed

    def training_step(self, batch, batch_idx):
        inputs, indices = batch
        self.seen.append((self.current_epoch, batch_idx, *indices.tolist()))
        self.batches += 1
        loss = (self.net(inputs) * (1 + 0.001 * self.batches) - inputs.sum(1, keepdim=True)).square().mean()
        self.mean(loss)
        self.log("mean", self.mean, on_epoch=True)
        self.log("loss", loss, on_epoch=True, on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch[0]).square().mean() + torch.rand(()))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}

    def train_dataloader(self):
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(Noisy(), batch_size=12, num_workers=self.workers)


class Watch(Callback):
    """Takes the state at one boundary, or goes on from one.

    Args:
        at: number of the boundary.
        resume: bytes of a state.
        replay: False to skip in the sampler.
    """

    def __init__(self, at=None, resume=None, replay=True):
        self.at, self.resume, self.saved, self.boundaries, self.replay = at, resume, None, 0, replay

    def setup(self, trainer, pl_module, stage):
        self.loop = OpenedLoop(trainer, lambda: self.boundary(), self.replay)
        if self.resume is not None:
            self.loop.resume(torch.load(io.BytesIO(self.resume), weights_only=True))

    def boundary(self):
        if self.boundaries == self.at:
            buffer = io.BytesIO()
            torch.save(self.loop.take(), buffer)
            self.saved = buffer.getvalue()
        self.boundaries += 1

    def teardown(self, trainer, pl_module, stage):
        self.loop.close()


def memory(job="a", **options):
    """Return a callback that captures every second step, in memory alone."""
    return MemoryCheckpoint(**{"job": job, "every_n_steps": 2, "disk_dir": False, **options})


def train(*callbacks, module=None, workers=0, seed=3, ckpt_path=None, **options):
    """Run a fit and return everything that has to be alike, by name."""
    seed_everything(seed)
    module = Regression(workers) if module is None else module
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": EPOCHS, **settings, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return facts(trainer, module)


def facts(trainer, module):
    """Return everything of a finished run that has to be alike, by name; bits of tensors as hexadecimal text."""
    optimizer = trainer.optimizers[0].state_dict()
    moments = [[*map(bits, state.values())] for state in optimizer["state"].values()]
    return {
        "weights": {name: bits(tensor) for name, tensor in module.state_dict().items()},
        "optimizer": (moments, str(optimizer["param_groups"])),
        "scheduler": [str(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "buffer": bits(module.batches),
        "logged": {
            name: bits(value) for name, value in trainer.callback_metrics.items() if not name.startswith("memory_checkpoint")
        },
        "random": (random.random(), float(np.random.rand()), bits(torch.rand(3))),  # noqa: NPY002
        "progress": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped),
        "seen": module.seen,
    }


def bits(value):
    if isinstance(value, DTensor):
        value = value.to_local()
    return torch.as_tensor(value).detach().cpu().numpy().tobytes().hex()


def same(whole, resumed):
    """Return the names of facts that differ; a resumed run has seen the end of what the whole one has."""
    seen = resumed["seen"]
    differ = [name for name in whole if name != "seen" and whole[name] != resumed[name]]
    return differ + ([] if seen == whole["seen"][len(whole["seen"]) - len(seen) :] else ["seen"])
