"""What the tests of Ok-Topk's strategies train: a small net whose batches go by the step, alike on any number of ranks."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins._lightning import LightningModule, Trainer

STEPS = 8
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Net(LightningModule):
    """A perceptron of several buckets' size.

    Args:
        save_to: where to save a checkpoint, after ``save_at`` steps.
    """

    def __init__(self, save_to=None, save_at=4, momentum=0.9):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 5))
        self.save_to, self.save_at, self.momentum = save_to, save_at, momentum
        self.losses = []

    def training_step(self, batch, batch_idx):
        x = self.data(self.global_step * self.trainer.accumulate_grad_batches + batch_idx % self.trainer.accumulate_grad_batches)
        loss = functional.cross_entropy(self.layers(x), x[:, :5].argmax(dim=1))
        self.losses.append(float(loss.detach()))
        return loss

    def data(self, number):
        """The batch of a step on this rank: a loader would begin anew when a run is resumed."""
        generator = torch.Generator().manual_seed(1000 * number + self.global_rank)
        return torch.randn(16, 20, generator=generator)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.save_to and self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.save_to)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum)


def loader(batches=200):
    return DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1)


def fit(module, world_size, strategy, ckpt_path=None, **options):
    """Train a module and return its weights as bytes."""
    torch.set_num_threads(1)
    options = {**QUIET, "max_steps": STEPS, **options}
    trainer = Trainer(
        accelerator="cpu", devices=world_size, strategy=strategy, use_distributed_sampler=False, **options
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return weights_of(module)


def weights_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
