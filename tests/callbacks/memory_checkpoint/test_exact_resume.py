"""A run that goes on from a state between two iterations, against the run that was never interrupted: bit for bit.

The resumed run starts from another seed: nothing but the state may decide how it goes on.
"""

import pytest

from lightning_plugins._lightning import ModelCheckpoint
from tests.callbacks.memory_checkpoint.runs import Regression, Watch, same, train

pytestmark = [pytest.mark.adapter, pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")]

OTHER = 99

CASES = [
    {},
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": 2},
    {"reload_dataloaders_every_n_epochs": 1},
    {"limit_train_batches": 5},
    {"num_sanity_val_steps": 0, "gradient_clip_val": 0.1},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_any_boundary_of_any_epoch(options):
    watch = Watch()
    whole = train(watch, **options)
    per_epoch = watch.boundaries // 3
    for at in {1, per_epoch - 1, per_epoch, per_epoch + 3, 2 * per_epoch + 2}:
        taking = Watch(at)
        train(taking, **options)
        assert same(whole, train(Watch(resume=taking.saved), seed=OTHER, **options)) == [], f"boundary {at}"


def test_accumulated_batches():
    """Right after an optimizer step nothing waits: of 6 batches in threes that is before the fourth, and between epochs."""
    whole = train(Watch(), accumulate_grad_batches=3)
    for at in (3, 6, 9):
        taking = Watch(at)
        train(taking, accumulate_grad_batches=3)
        assert same(whole, train(Watch(resume=taking.saved), seed=OTHER, accumulate_grad_batches=3)) == []


def test_several_workers():
    """Their random numbers follow from a seed that the epoch's iterator draws."""
    whole = train(Watch(), workers=2)
    for at in (2, 8):
        taking = Watch(at)
        train(taking, workers=2)
        assert same(whole, train(Watch(resume=taking.saved), seed=OTHER, workers=2)) == []


def test_in_a_run_that_began_at_a_named_checkpoint(tmp_path):
    """Of the end of an epoch: the next one keeps the iterators that were made before training began."""
    saving = ModelCheckpoint(tmp_path, filename="first", save_on_train_epoch_end=True)
    train(saving, workers=2, max_epochs=1, enable_checkpointing=True)
    whole = train(Watch(), workers=2, ckpt_path=tmp_path / "first.ckpt")
    taking = Watch(2)
    train(taking, workers=2, ckpt_path=tmp_path / "first.ckpt")
    assert same(whole, train(Watch(resume=taking.saved), seed=OTHER, workers=2)) == []


@pytest.mark.parametrize("options", CASES[:3], ids=str)
def test_watching_changes_nothing(options):
    assert same(train(**options), train(Watch(4), **options)) == []


def test_the_loop_is_left_as_it_was():
    watch = Watch()
    train(watch)
    loops = (watch.loop.trainer.fit_loop, watch.loop.trainer.fit_loop.epoch_loop)
    names = ("setup_data", "_load_combined_loader_states", "on_run_start", "_on_before_fetch")
    assert not any(name in vars(loop) for loop in loops for name in names)


def test_a_state_of_another_seed_is_another_run():
    """Which shows that the comparison can fail."""
    assert set(same(train(Watch()), train(Watch(), seed=4))) >= {"weights", "optimizer", "logged", "random", "seen"}
    assert Regression().seen == []
