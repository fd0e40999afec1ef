"""A tiny model of up that records what it is shown, and the check that a run goes on in the middle of an epoch."""

import torch

from lightning_plugins._lightning import LightningModule, Trainer


def trainer(folder, **options):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


class UpFromMeans(LightningModule):
    """Regression of up from three mean colours.

    Args:
        save_at: number of the step after which it saves itself to ``save_to``.
    """

    def __init__(self, save_at=None, save_to=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.shown = []
        self.save_at, self.save_to = save_at, save_to

    def training_step(self, batch, batch_idx):
        self.shown.append({key: value.clone() for key, value in batch.items()})
        return (self.layer(batch["image"].mean((2, 3))) - batch["up"]).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.save_to)

    def validation_step(self, batch, batch_idx):
        self.log("error", (self.layer(batch["image"].mean((2, 3))) - batch["up"]).abs().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def check_that_it_goes_on(data, folder):
    """Train 8 steps, and the last four of them again from a checkpoint; the data of an epoch must last for three steps."""
    torch.manual_seed(0)
    whole = UpFromMeans(4, folder / "middle.ckpt")
    first = trainer(folder, max_steps=8)
    first.fit(whole, data())
    assert "error" in first.callback_metrics
    resumed = UpFromMeans()
    trainer(folder, max_steps=8).fit(resumed, data(), ckpt_path=folder / "middle.ckpt")
    assert len(resumed.shown) == 4
    for ours, theirs in zip(resumed.shown, whole.shown[4:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
