"""Two gloo processes train to the weights of one process with the same global batch."""

import pytest
import torch

from lightning_plugins import DepthTeacher, PanoramicDepth, RenderedRooms
from lightning_plugins._lightning import Callback, Trainer, seed_everything

pytestmark = pytest.mark.adapter

TINY = {"backbone": "test_resnet", "widths": [8, 8, 8, 16, 16], "sphere_widths": [8, 8, 8]}


class FrozenBatchStatistics(Callback):
    """Batch norm of two half batches is not that of the whole batch: this test is not about that."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def train(rank, world_size, teacher_file, folder):
    """Train the student for six steps of four rooms in all; return its weights."""
    seed_everything(0, verbose=False)
    module = PanoramicDepth(**TINY, teacher=teacher_file)
    rooms = RenderedRooms(train_rooms=12, val_rooms=2, test_rooms=1, height=32, batch_size=4 // world_size, seed=3)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world_size,
        # The L1 distance has a gradient of sign alone, and Adam divides by its size: single precision turns the last bit of a sum
        # into a step of the learning rate. In double precision what is left is what the two processes do differently.
        precision="64-true",
        strategy="ddp" if world_size > 1 else "auto",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FrozenBatchStatistics()],
    )
    trainer.fit(module, rooms)
    return {name: value.numpy() for name, value in module.state_dict().items()}, trainer.world_size, trainer.global_step


def test_two_processes_equal_one(ranks, tmp_path):
    seed_everything(0, verbose=False)
    DepthTeacher(widths=TINY["widths"]).deploy(tmp_path / "teacher.ckpt")
    arguments = (str(tmp_path / "teacher.ckpt"), str(tmp_path))
    ((alone, _, steps),) = ranks.run(train, 1, *arguments)
    first, second = ranks.run(train, 2, *arguments)
    assert (first[1], first[2], steps) == (2, 6, 6)
    start = PanoramicDepth(**TINY, teacher=arguments[0]).state_dict()
    moved = 0.0
    for name, value in alone.items():
        torch.testing.assert_close(
            torch.from_numpy(first[0][name]), torch.from_numpy(value), rtol=0, atol=1e-5, msg=f"{name} differs"
        )
        assert (first[0][name] == second[0][name]).all(), name
        moved = max(moved, float((torch.from_numpy(value) - start[name]).abs().max()))
    assert moved > 1e-3, "nothing was trained"
