"""Two gloo processes train to the weights of one process with the same global batch."""

import pytest
import torch

from lightning_plugins import PanoramicUpright
from lightning_plugins._lightning import Callback, Trainer, seed_everything
from tests.models.panoramic_upright.tilted_rooms import tiny_rooms

pytestmark = pytest.mark.adapter

TINY = {"widths": [8, 12], "blocks": 1, "image_height": 32}


class FrozenBatchStatistics(Callback):
    """Batch norm of two half batches is not that of the whole batch: this test is not about that."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def train(rank, world_size, options, strategy, folder):
    """Train on twelve rooms for two epochs of batches of four in all; return the weights and the figures of the validation."""
    seed_everything(0, verbose=False)
    module = PanoramicUpright(**TINY, **options)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world_size,
        # The L1 loss has a gradient of sign alone, and Adam divides by its size: single precision turns the last bit of a sum
        # into a step of the learning rate. In double precision what is left is what the two processes do differently.
        precision="64-true",
        strategy=strategy if world_size > 1 else "auto",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FrozenBatchStatistics()],
    )
    trainer.fit(module, tiny_rooms(train_rooms=12, val_rooms=4, batch_size=4 // world_size))
    figures = {name: float(figure) for name, figure in trainer.callback_metrics.items() if "/val_" in name}
    return {name: value.numpy() for name, value in module.state_dict().items()}, figures, trainer.world_size, trainer.global_step


@pytest.mark.parametrize(
    ("options", "strategy", "steps"),
    [
        ({}, "ddp", 6),
        ({"reconstruct": True, "adversarial_weight": 0.0, "lookup_table": "learned"}, "ddp", 6),
        ({"reconstruct": True, "adversarial_weight": 0.1}, "ddp_find_unused_parameters_true", 12),
        ({"reconstruct": True, "adversarial_weight": 0.1, "accumulate_batches": 2}, "ddp_find_unused_parameters_true", 8),
    ],
    ids=["orientation alone", "no discriminator", "discriminator", "accumulated"],
)
def test_two_processes_equal_one(options, strategy, steps, ranks, tmp_path):
    ((alone, figures, _, steps_alone),) = ranks.run(train, 1, options, strategy, str(tmp_path))
    first, second = ranks.run(train, 2, options, strategy, str(tmp_path))
    assert (first[2], first[3], steps_alone) == (2, steps, steps)
    assert first[1] == pytest.approx(figures, abs=1e-4), "the figures are those of all rooms"
    seed_everything(0, verbose=False)
    start = PanoramicUpright(**TINY, **options).state_dict()
    moved = 0.0
    for name, value in alone.items():
        torch.testing.assert_close(
            torch.from_numpy(first[0][name]), torch.from_numpy(value), rtol=0, atol=1e-5, msg=f"{name} differs"
        )
        assert (first[0][name] == second[0][name]).all(), name
        moved = max(moved, float((torch.from_numpy(value) - start[name]).abs().max()))
    assert moved > 1e-3, "nothing was trained"
