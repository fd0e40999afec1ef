"""Checkpoints that survive a disk which fills and a kill while the next one is written."""

import errno
import os
import signal

import pytest
import torch

from lightning_plugins._support.failpoints import armed
from lightning_plugins.strategies.atomic_checkpoint import AtomicCheckpointIO

pytestmark = pytest.mark.adapter


def checkpoint(value):
    return {"global_step": value, "state_dict": {"weight": torch.full((5,), float(value))}}


def step(path):
    return AtomicCheckpointIO().load_checkpoint(path)["global_step"]


def test_what_was_saved_is_loaded_and_removed(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "made" / "a.ckpt"
    io.save_checkpoint(checkpoint(3), path)
    loaded = io.load_checkpoint(path, map_location="cpu")
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["state_dict"]["weight"], torch.full((5,), 3.0))
    assert torch.load(path, weights_only=True)["global_step"] == 3
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []
    assert "built for" in repr(io)


def test_a_disk_that_fills_leaves_the_old_checkpoint(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint(checkpoint(1), path)
    with armed("atomic_write/replace=full"), pytest.raises(OSError, match="No space left") as raised:
        io.save_checkpoint(checkpoint(2), path)
    assert raised.value.errno == errno.ENOSPC
    assert step(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def save_twice(rank, world_size, path):
    with armed("atomic_write/replace=kill:2"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), path)
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), path)


def test_a_kill_while_it_saves_leaves_the_old_checkpoint(ranks, tmp_path):
    path = tmp_path / "a.ckpt"
    with ranks.start(save_twice, 1, path) as handle:
        assert handle.join(30) == [-signal.SIGKILL]
    assert step(path) == 1


def test_storage_options_and_addresses_are_left_to_lightning(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "a.ckpt", storage_options={})
    monkeypatch.chdir(tmp_path)
    AtomicCheckpointIO().save_checkpoint(checkpoint(4), "memory://somewhere/a.ckpt")
    assert step("memory://somewhere/a.ckpt") == 4
    assert os.listdir(tmp_path) == []
