"""A model in pieces, beyond its exact resume (test_kills.py): its steps on disk are whole for others, and what does not fit."""

import pytest
import torch

from lightning_plugins._lightning import Callback, Trainer, seed_everything, submodule
from lightning_plugins._support.errors import InputError
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.engines.resilience.disk_checkpoint import read_checkpoint
from lightning_plugins.engines.resilience.disk_steps import steps
from tests.callbacks.memory_checkpoint.killed import Sharded
from tests.callbacks.memory_checkpoint.test_kills import OLD, keeper
from tests.engines.resilience.keeper_parts import assert_same

pytestmark = pytest.mark.adapter
__all__ = ["keeper"]
SAVED_AT = 3


class Recording(Callback):
    """Notes the whole weights and averages of gradients that training begins with and those after every step; may crash."""

    def __init__(self, crash_at, save_to):
        self.seen, self.crash_at, self.save_to = {}, crash_at, save_to

    def on_train_start(self, trainer, pl_module):
        self.note(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.save_to is not None and trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self.save_to)
        if trainer.global_step == self.crash_at:
            raise KeyError("a fault")

    def note(self, trainer, module):
        states = trainer.optimizers[0].state
        averages = [whole(states[one]["exp_avg"]) for one in module.parameters() if one in states]
        self.seen[trainer.global_step] = ({name: whole(value) for name, value in module.state_dict().items()}, averages)


class Keeping(Sharded):
    """Leaves a weight out of its checkpoints and puts its own back, as modules do with weights from elsewhere."""

    def on_save_checkpoint(self, checkpoint):
        del checkpoint["state_dict"]["second.weight"]

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["second.weight"] = self.second.weight.detach()


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def fit(rank, world_size, memory, options):
    """Train with pieces on all ranks; return what was recorded, and the sentence of an error."""
    seed_everything(3)
    recording = Recording(options.get("crash_at"), options.get("save_to"))
    tensor_parallel = options.get("tensor_parallel", False)
    data, tensor = (1, world_size) if tensor_parallel else (world_size, 1)
    strategy = submodule("strategies").ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)
    callbacks = [recording, *([MemoryCheckpoint(**memory)] if memory else [])]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=world_size, strategy=strategy, callbacks=callbacks, max_epochs=3, **quiet)
    try:
        trainer.fit(options.get("module", Sharded)(tensor_parallel), ckpt_path=options.get("ckpt_path"))
    except (InputError, KeyError, RuntimeError) as error:  # the last of a rank that sees another crash before it does
        return recording.seen, str(error)
    return recording.seen, ""


@pytest.fixture
def train(ranks, keeper):
    """Fit on a number of ranks; return what each has recorded, and its error."""
    return lambda world_size, memory, **options: ranks.run(
        fit, world_size, memory, options, init=False, env=keeper, timeout_s=120
    )


@OLD
def test_others_go_on_from_its_steps(train, tmp_path):
    """In another number of ranks, from the one ordinary checkpoint that is made of all pieces."""
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": str(tmp_path / "disk"), "disk_every_n_steps": 2}
    recorded, error = train(2, memory)[0]
    assert error == ""
    newest = steps(tmp_path / "disk" / "fit-0")[0]
    assert newest.step >= 6
    checkpoint = read_checkpoint(newest.path)
    weights, averages = recorded[newest.step]
    assert_same(dict(checkpoint["state_dict"]), weights)
    assert_same([state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()], averages)
    torch.save(checkpoint, tmp_path / "whole.ckpt")
    found, error = train(3, None, ckpt_path=str(tmp_path / "whole.ckpt"))[0]
    assert (error, min(found)) == ("", newest.step)
    assert_same(found[newest.step], (weights, averages))


@OLD
def test_pieces_of_another_layout_do_not_fit(train):
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": False, "resume": True}
    train(2, memory, crash_at=7)
    for world_size, tensor_parallel, words in (
        (3, False, "a state of 2 ranks, and there are 3"),
        (2, True, "a state of ranks in the layout data_parallel=2, tensor_parallel=1, and this is data_parallel=1, tensor_par"),
    ):
        found = train(world_size, memory, tensor_parallel=tensor_parallel)
        assert all(words in error and not seen for seen, error in found)
    found = train(2, {**memory, "resume": "auto"}, tensor_parallel=True)
    assert [(min(seen), error) for seen, error in found] == [(0, "")] * 2


@OLD
def test_a_named_checkpoint_wins(train, tmp_path):
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": False}
    train(2, None, crash_at=7, save_to=str(tmp_path / "named"))
    train(2, memory, crash_at=7)
    alone = train(2, None, ckpt_path=str(tmp_path / "named"))
    beside = train(2, memory, ckpt_path=str(tmp_path / "named"))
    assert min(alone[0][0]) == SAVED_AT
    assert_same(beside, alone)


@OLD
def test_a_module_changes_what_is_restored(train):
    memory = {"job": "a", "every_n_steps": 2, "disk_dir": False}
    expected, _ = train(2, memory, module=Keeping)[0]
    train(2, memory, crash_at=7, module=Keeping)
    found, error = train(2, memory, module=Keeping)[0]
    assert (error, min(found)) == ("", 6)
    assert_same(found[6][0].pop("second.weight"), Sharded().second.weight.detach())
    expected[6][0].pop("second.weight")
    assert_same(found[6], expected[6])
