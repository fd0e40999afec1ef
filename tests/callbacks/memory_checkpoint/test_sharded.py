"""A model in pieces, beyond its exact resume (test_kills.py): its steps on disk are whole for others, and what does not fit."""

import pytest
import torch

from lightning_plugins._lightning import Callback, Trainer, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.engines.resilience.disk_checkpoint import read_checkpoint
from lightning_plugins.engines.resilience.disk_steps import steps
from tests.callbacks.memory_checkpoint.killed import Sharded
from tests.callbacks.memory_checkpoint.test_kills import OLD, keeper
from tests.engines.resilience.keeper_parts import assert_same

pytestmark = pytest.mark.adapter
__all__ = ["keeper"]


class Recording(Callback):
    """Notes the whole weights and averages of gradients that training begins with and those after every step; may crash."""

    def __init__(self, crash_at):
        self.seen, self.crash_at = {}, crash_at

    def on_train_start(self, trainer, pl_module):
        self.note(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.crash_at:
            raise KeyError("a fault")

    def note(self, trainer, module):
        states = trainer.optimizers[0].state
        averages = [whole(states[one]["exp_avg"]) for one in module.parameters() if one in states]
        self.seen[trainer.global_step] = ({name: whole(value) for name, value in module.state_dict().items()}, averages)


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def fit(rank, world_size, memory, crash_at=None, ckpt_path=None, tensor_parallel=False):
    """Train with pieces on all ranks; return what was recorded, and the sentence of an error."""
    recording = Recording(crash_at)
    data, tensor = (1, world_size) if tensor_parallel else (world_size, 1)
    strategy = submodule("strategies").ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    callbacks = [recording, *([MemoryCheckpoint(**memory)] if memory else [])]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=world_size, strategy=strategy, callbacks=callbacks, max_epochs=3, **quiet)
    try:
        trainer.fit(Sharded(tensor_parallel), ckpt_path=ckpt_path)
    except (InputError, KeyError) as error:
        return recording.seen, str(error)
    return recording.seen, ""


@OLD
def test_others_go_on_from_its_steps(ranks, keeper, tmp_path):
    """In another number of ranks, from the one ordinary checkpoint that is made of all pieces."""
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": str(tmp_path / "disk"), "disk_every_n_steps": 2}
    recorded, error = ranks.run(fit, 2, memory, init=False, env=keeper, timeout_s=120)[0]
    assert error == ""
    newest = steps(tmp_path / "disk" / "fit-0")[0]
    assert newest.step >= 6
    checkpoint = read_checkpoint(newest.path)
    weights, averages = recorded[newest.step]
    assert_same(dict(checkpoint["state_dict"]), weights)
    assert_same([state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()], averages)
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    found, error = ranks.run(fit, 3, None, None, str(tmp_path / "whole.ckpt"), init=False, env=keeper, timeout_s=120)[0]
    assert (error, min(found)) == ("", newest.step)
    assert_same(found[newest.step], (weights, averages))


@OLD
def test_pieces_of_another_layout_do_not_fit(ranks, keeper):
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": False, "resume": True}
    ranks.run(fit, 2, memory, 7, init=False, env=keeper, timeout_s=120)
    for world_size, tensor_parallel, words in (
        (3, False, "a state of 2 ranks, and there are 3"),
        (2, True, "a state of ranks in the layout data_parallel=2, tensor_parallel=1, and this is data_parallel=1, tensor_par"),
    ):
        found = ranks.run(fit, world_size, memory, None, None, tensor_parallel, init=False, env=keeper, timeout_s=120)
        assert all(words in error and not seen for seen, error in found)
    found = ranks.run(fit, 2, {**memory, "resume": "auto"}, None, None, True, init=False, env=keeper, timeout_s=120)
    assert [(min(seen), error) for seen, error in found] == [(0, "")] * 2
