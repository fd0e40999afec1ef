"""RenderedRooms: the same for the same seed whatever came before, other rooms in each split, a cache that is checked."""

import numpy as np
import pytest
import torch

from lightning_plugins import RenderedRooms
from lightning_plugins.datamodules._rooms_cache import Rooms
from lightning_plugins.datamodules._views import draw_view
from lightning_plugins.datamodules.rendered_rooms import room_item
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS, render_room

pytestmark = pytest.mark.adapter

SMALL = {"train_rooms": 6, "val_rooms": 3, "test_rooms": 3, "height": 32, "batch_size": 2}


def epoch_of(rooms, epoch):
    loader = rooms.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    rooms = RenderedRooms(**SMALL)
    straight = [epoch_of(rooms, epoch) for epoch in range(3)]
    again = epoch_of(RenderedRooms(**SMALL), 2)  # a resumed run starts here
    for ours, theirs in zip(again, straight[2], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rooms_of = [
        {int(i): image for batch in epoch for i, image in zip(batch["index"], batch["image"], strict=True)} for epoch in straight
    ]
    assert all(not torch.equal(rooms_of[0][room], rooms_of[1][room]) for room in range(6)), "each epoch varies every room anew"
    order = [torch.cat([batch["index"] for batch in epoch]).tolist() for epoch in straight]
    assert sorted(order[0]) == list(range(6))
    assert order[0] != order[1] or order[1] != order[2]


def test_workers_load_the_same():
    alone, helped = (epoch_of(RenderedRooms(**SMALL, num_workers=n), 1) for n in (0, 2))
    for ours, theirs in zip(alone, helped, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_loader_goes_on_in_the_middle_of_an_epoch():
    whole = [batch["index"].tolist() for batch in epoch_of(RenderedRooms(**SMALL), 3)]
    first = RenderedRooms(**SMALL).train_dataloader()
    first.sampler.set_epoch(3)
    batches = iter(first)
    next(batches), next(batches)
    state = first.state_dict()
    second = RenderedRooms(**SMALL).train_dataloader()
    second.load_state_dict(state)
    second.sampler.set_epoch(3)
    assert [batch["index"].tolist() for batch in second] == whole[2:]
    assert [batch["index"].tolist() for batch in second] == whole, "the epoch after that is whole again"


def test_evaluation_sees_every_test_room_in_order():
    assert torch.cat([batch["index"] for batch in RenderedRooms(**SMALL).evaluation_dataloader()]).tolist() == [0, 1, 2]


def test_two_ranks_share_the_batches_of_one():
    rooms = RenderedRooms(**SMALL)
    sampler = rooms.train_dataloader().sampler
    sampler.set_epoch(4)
    whole = list(sampler)
    shards = []
    for rank in range(2):
        shard = type(sampler)(sampler.dataset, num_replicas=2, rank=rank, shuffle=True, seed=0)
        shard.set_epoch(4)
        shards.append(list(shard))
    for step in range(3):
        assert sorted(whole[2 * step : 2 * step + 2]) == sorted([shards[0][step], shards[1][step]])


def test_splits_are_drawn_from_their_distributions():
    rooms = RenderedRooms(**SMALL, augment=False)
    first = (2 << 48) + 0
    expected = render_room(first, 32, 64, HELD_OUT_ROOMS)
    assert np.array_equal(rooms.rooms("test").image[0], expected.image)
    assert np.array_equal(rooms.rooms("test").depth_m[0], expected.depth_m)
    assert np.array_equal(rooms.rooms("train").image[1], render_room(1, 32, 64, TRAINING_ROOMS).image)
    assert not np.array_equal(rooms.rooms("val").image, rooms.rooms("test").image)
    assert not set(TRAINING_ROOMS.shapes) & set(HELD_OUT_ROOMS.shapes)


def test_augmentation_moves_depth_and_mask_with_the_image():
    # Depth is written into the image, so that any geometry done to one and not the other shows.
    depth = np.random.default_rng(0).uniform(1, 9, (8, 16)).astype(np.float32)
    mask = depth > 3
    room = Rooms(np.stack([25 * depth, 255 * mask, np.zeros_like(depth)], axis=2).astype(np.uint8), depth, mask)
    for seed in range(8):
        item = room_item(room, 0, draw_view(16, np.random.default_rng(seed)))
        turned, turned_depth, turned_mask = item["image"].numpy(), item["depth"][0].numpy(), item["mask"][0].numpy()
        # Colour changes are monotonic per channel: ranks survive them where nothing is clipped.
        free = (turned[0] > 1e-3) & (turned[0] < 1)
        assert (np.diff(turned[0][free][np.argsort(turned_depth[free])]) >= 0).all()
        assert ((turned[1] > 0.1) == turned_mask).all()
        assert sorted(turned_depth.ravel()) == sorted(depth.ravel())


def test_the_cache_returns_the_same_rooms_and_survives_damage(tmp_path):
    fresh = RenderedRooms(**SMALL).rooms("val")
    RenderedRooms(**SMALL, cache=str(tmp_path)).rooms("val")
    (file,) = tmp_path.iterdir()
    cached = RenderedRooms(**SMALL, cache=str(tmp_path)).rooms("val")
    assert np.array_equal(cached.image, fresh.image)
    assert np.array_equal(cached.depth_m, fresh.depth_m)
    for damage in (file.read_bytes()[:1000], b"", b"not a zip file"):
        file.write_bytes(damage)
        assert np.array_equal(RenderedRooms(**SMALL, cache=str(tmp_path)).rooms("val").image, fresh.image)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*; give another folder or none"):
        RenderedRooms(**SMALL, cache=str(tmp_path / "file")).rooms("val")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_rooms": 0}, "train_rooms must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"height": 50}, "height must be a multiple of 32 and at least 32 rows, got 50"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"tilt": "smal"}, "there are no tilts 'smal'; valid are small"),
        ({"with_level": True}, "with_level needs a tilt, got none"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        RenderedRooms(**options)
