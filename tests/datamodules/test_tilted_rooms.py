"""Tilted rooms. Oracle of up: the floor lies straight below the camera, as far as the scene says. Then a real Trainer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_plugins import RenderedRooms
from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, TRAINING_ROOMS, render_room
from lightning_plugins.engines.rendering.render import room_scene
from tests.datamodules.resuming import check_that_it_goes_on

pytestmark = pytest.mark.adapter

SMALL = {"train_rooms": 6, "val_rooms": 3, "test_rooms": 3, "height": 32, "batch_size": 2}


def epoch_of(rooms, epoch):
    loader = rooms.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def pixel(direction, height):
    """Row and column, of the image of that height, that a direction is seen in."""
    x, y, z = direction
    row = math.acos(max(-1.0, min(1.0, z))) / math.pi * height
    column = (math.atan2(-y, x) / (2 * math.pi) + 0.5) * 2 * height
    return min(int(row), height - 1), int(column) % (2 * height)


def directions(height):
    colatitude = math.pi * (np.arange(height)[:, None] + 0.5) / height
    longitude = 2 * math.pi * ((np.arange(2 * height) + 0.5) / (2 * height) - 0.5)
    x, y = np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude)
    return np.stack([x, y, np.broadcast_to(np.cos(colatitude), x.shape)], axis=2)


def items(batches):
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["index"]))]


@pytest.mark.parametrize("tilt", ["small", "hand_held", "sphere"])
@pytest.mark.parametrize("fresh", [False, True])
def test_up_points_away_from_the_floor_in_every_view(tilt, fresh):
    rooms = RenderedRooms(**SMALL | {"height": 64}, tilt=tilt, fresh_rooms=fresh)
    training = [(item, TRAINING_ROOMS, 6 * 2 * fresh + int(item["index"])) for item in items(epoch_of(rooms, 2))]
    held_out = [(item, HELD_OUT_ROOMS, (2 << 48) + int(item["index"])) for item in items(rooms.test_dataloader())]
    for item, distribution, seed in training + held_out:
        up = item["up"].double().numpy()
        assert item["up"].dtype == torch.float32
        assert np.linalg.norm(up) == pytest.approx(1, abs=1e-6)
        # A pixel is up to 2 degrees off: it sees the floor slightly farther away.
        camera_height_m = room_scene(seed, distribution).camera_m[2]
        assert float(item["depth"][0][pixel(-up, 64)]) == pytest.approx(camera_height_m, rel=0.005)
        assert tilt == "sphere" or up[2] > math.cos(math.radians(20))


def test_the_level_image_is_the_tilted_one_levelled():
    rooms = RenderedRooms(**SMALL | {"height": 64}, tilt="small", with_level=True)
    light_differs = []
    for item in items([*epoch_of(rooms, 1), *rooms.val_dataloader()]):
        x, y, z = item["up"].double().numpy()
        # Rodrigues' formula of the rotation that takes up to the vertical along the shortest way.
        cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
        level_from_camera = np.eye(3) + cross + cross @ cross / (1 + z)
        np.testing.assert_allclose(level_from_camera @ [x, y, z], [0, 0, 1], atol=1e-7)
        seen = directions(64) @ level_from_camera  # rows of R^T d
        image = item["image"].numpy()
        levelled = np.array([[image[(slice(None), *pixel(d, 64))] for d in row] for row in seen]).transpose(2, 0, 1)
        level = item["level"].numpy()
        assert np.median(np.abs(levelled - level)) < 0.02
        assert np.corrcoef(levelled.ravel(), level.ravel())[0, 1] > 0.93
        light_differs.append((levelled - level)[:, 8:-8].mean())
    assert np.abs(light_differs).max() < 0.004, "both are exposed alike"


def test_rooms_without_tilt_and_the_tilted_ones_are_the_same_rooms():
    plain, tilted, other = (RenderedRooms(**SMALL, tilt=tilt) for tilt in (None, "small", "sphere"))
    assert set(next(iter(plain.val_dataloader()))) == {"image", "depth", "mask", "index"}
    assert set(next(iter(tilted.val_dataloader()))) == {"image", "depth", "mask", "index", "up"}
    assert not np.array_equal(plain.rooms("val").image, tilted.rooms("val").image)
    # The camera stands where it stood: extremes of the depth hardly change, whichever way it is held.
    for split in (tilted, other):
        np.testing.assert_allclose(split.rooms("val").depth_m.max((1, 2)), plain.rooms("val").depth_m.max((1, 2)), rtol=0.15)


def test_small_tilts_are_those_of_the_renderers_own_cone():
    rooms = RenderedRooms(**SMALL, tilt="small").rooms("test")
    for index in range(3):
        expected = render_room((2 << 48) + index, 32, 64, replace(HELD_OUT_ROOMS, max_tilt_deg=20.0))
        assert np.array_equal(rooms.image[index], expected.image)
        np.testing.assert_allclose(rooms.up[index], expected.up, atol=1e-7)


def test_held_out_tilts_are_fixed_by_the_seed():
    first, again, other = (RenderedRooms(**SMALL, tilt="small", seed=seed) for seed in (0, 0, 1))
    for split in ("val", "test"):
        assert np.array_equal(first.rooms(split).up, again.rooms(split).up)
        assert not np.array_equal(first.rooms(split).up, other.rooms(split).up)


def test_the_cache_tells_tilts_apart_and_returns_up_and_level(tmp_path):
    for tilt, with_level in ((None, False), ("small", False), ("sphere", False), ("small", True)):
        options = SMALL | {"tilt": tilt, "with_level": with_level}
        fresh = RenderedRooms(**options).rooms("val").arrays()
        for _ in range(2):
            cached = RenderedRooms(**options, cache=str(tmp_path)).rooms("val").arrays()
            assert set(cached) == set(fresh)
            assert all(np.array_equal(cached[name], fresh[name]) for name in fresh)
    assert len(list(tmp_path.iterdir())) == 4


def test_fresh_rooms_are_others_in_each_epoch_and_the_same_in_each_run_and_worker():
    fresh = SMALL | {"tilt": "small", "fresh_rooms": True, "with_level": True}
    first, second = (epoch_of(RenderedRooms(**fresh), epoch) for epoch in (0, 1))
    again = epoch_of(RenderedRooms(**fresh, num_workers=2), 1)
    for ours, theirs in zip(second, again, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    # The height of up is the room's own: yaw and mirror leave it.
    heights = torch.cat([batch["up"][:, 2] for batch in first + second])
    assert heights.sort().values.diff().min() > 1e-6
    fixed = {int(item["index"]): item for item in items(epoch_of(RenderedRooms(**SMALL, tilt="small"), 0))}
    for item in items(first):
        assert torch.equal(item["image"], fixed[int(item["index"])]["image"]), "epoch 0 holds the fixed rooms"


def test_fresh_rooms_are_not_rendered_before_training(tmp_path):
    rooms = RenderedRooms(**SMALL | {"train_rooms": 10**6}, fresh_rooms=True, cache=str(tmp_path))
    rooms.setup("fit")
    assert set(rooms.splits) == {"val"}
    assert len(rooms.train_dataloader()) == 500000


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_goes_on_in_the_middle_of_an_epoch(fresh, tmp_path):
    check_that_it_goes_on(lambda: RenderedRooms(**SMALL, tilt="small", fresh_rooms=fresh), tmp_path)
