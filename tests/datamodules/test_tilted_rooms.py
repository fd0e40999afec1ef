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


def bilinear(image, directions):
    """What an image (3, H, W) shows in directions (..., 3) that are away from the poles."""
    height, width = image.shape[1:]
    x, y, z = np.moveaxis(directions, -1, 0)
    v = np.arccos(z) / math.pi * height - 0.5
    u = (np.arctan2(-y, x) / (2 * math.pi) + 0.5) * width - 0.5
    row, column = np.floor(v).astype(int), np.floor(u).astype(int)
    shares = [(row, 1 - v + row), (row + 1, v - row)], [(column, 1 - u + column), (column + 1, u - column)]
    return sum(image[:, r, c % width] * a * b for r, a in shares[0] for c, b in shares[1])


def sharpness(image):
    """Mean square of the second differences along rows and columns between 45 degrees up and down."""
    middle = image[:, image.shape[1] // 4 : -image.shape[1] // 4]
    return np.square(np.diff(middle, 2, axis=1)).mean() + np.square(np.diff(middle, 2, axis=2)).mean()


def deviation(one, other):
    return math.sqrt(np.square(one - other).mean())


@pytest.mark.parametrize("tilt", ["small", "hand_held", "sphere"])
@pytest.mark.parametrize(("fresh", "with_level"), [(False, False), (True, False), (True, True)])
def test_up_points_away_from_the_floor_in_every_view(tilt, fresh, with_level):
    rooms = RenderedRooms(**SMALL | {"height": 64}, tilt=tilt, fresh_rooms=fresh, with_level=with_level)
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


def test_the_level_image_is_the_tilted_one_levelled_noise_and_all():
    rooms = RenderedRooms(**SMALL | {"height": 64}, tilt="small", with_level=True)
    found = []
    for item in items([*epoch_of(rooms, 1), *rooms.val_dataloader()]):
        x, y, z = item["up"].double().numpy()
        # Rodrigues' formula of the rotation that takes up to the vertical along the shortest way.
        cross = np.array([[0, 0, -x], [0, 0, -y], [x, y, 0]])
        level_from_camera = np.eye(3) + cross + cross @ cross / (1 + z)
        np.testing.assert_allclose(level_from_camera @ [x, y, z], [0, 0, 1], atol=1e-7)
        # The tilted camera's poles lie in the rows that are left out.
        seen = (directions(64) @ level_from_camera)[8:-8]  # rows of R^T d
        found.append(deviation(bilinear(item["image"].double().numpy(), seen), item["level"].double().numpy()[:, 8:-8]))
    assert np.mean(found) < 0.012, "two renderings have 0.022"


@pytest.mark.parametrize("tilt", ["small", "sphere"])
def test_an_image_with_a_level_twin_is_what_the_tilted_camera_sees(tilt):
    alone, twin = (RenderedRooms(**SMALL | {"height": 64}, tilt=tilt, with_level=given).rooms("test") for given in (False, True))
    for name in ("depth_m", "mask", "up"):
        assert np.array_equal(getattr(alone, name), getattr(twin, name))
    for index in range(3):
        level = render_room((2 << 48) + index, 64, 128, HELD_OUT_ROOMS).image
        # They differ by their noise and their exposure.
        assert deviation(twin.image[index] / 255, alone.image[index] / 255) < 0.035
        assert deviation(twin.level[index] / 255, level / 255) < 0.035


def test_turning_does_not_blur():
    rooms = RenderedRooms(**SMALL | {"test_rooms": 24}, tilt="small", with_level=True).rooms("test")
    planes = ((room / 255).transpose(0, 3, 1, 2) for room in (rooms.image, rooms.level))
    image, level = ([sharpness(one) for one in images] for images in planes)
    # Turned at their own size instead of at twice that, they have 0.81.
    assert np.exp(np.log(np.divide(image, level)).mean()) == pytest.approx(1, abs=0.1)


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
    fixed = {int(item["index"]): item for item in items(epoch_of(RenderedRooms(**SMALL, tilt="small", with_level=True), 0))}
    for item in items(first):
        for name in ("image", "level", "depth"):
            assert torch.equal(item[name], fixed[int(item["index"])][name]), "epoch 0 holds the fixed rooms"


def test_fresh_rooms_are_not_rendered_before_training(tmp_path):
    rooms = RenderedRooms(**SMALL | {"train_rooms": 10**6}, fresh_rooms=True, cache=str(tmp_path))
    rooms.setup("fit")
    assert set(rooms.splits) == {"val"}
    assert len(rooms.train_dataloader()) == 500000


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_goes_on_in_the_middle_of_an_epoch(fresh, tmp_path):
    check_that_it_goes_on(lambda: RenderedRooms(**SMALL, tilt="small", fresh_rooms=fresh), tmp_path)
