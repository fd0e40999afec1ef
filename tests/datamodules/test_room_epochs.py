"""Law: augmentation is a function of epoch and index, so that a room comes back in another view, and the same in a second run."""

import pytest
import torch

from lightning_plugins import RenderedRooms

pytestmark = pytest.mark.adapter


def views(epoch):
    """Return every room's image by its index."""
    rooms = RenderedRooms(train_rooms=6, val_rooms=1, test_rooms=1, height=32, batch_size=2, seed=5)
    loader = rooms.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {int(i): image for batch in loader for i, image in zip(batch["index"], batch["image"], strict=True)}


def test_a_room_looks_different_in_each_epoch_and_the_same_in_each_run():
    first, second, again = views(0), views(1), views(1)
    assert set(first) == set(range(6))
    for index in range(6):
        assert not torch.equal(first[index], second[index])
        assert torch.equal(second[index], again[index])
