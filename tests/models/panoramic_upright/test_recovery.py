"""What levelling recovers, with estimators whose errors are known by construction."""

import math

import pytest
import torch

from lightning_plugins.models.panoramic_depth.metrics import DepthMetrics
from lightning_plugins.models.panoramic_upright.recovery import TiltedRoom, depth_by_levelling, score_ways
from tests.models.panoramic_upright.test_reconstruction import level_directions

HEIGHT = 32


def world(height, camera_to_level):
    """Depth of a world that is a smooth function of the level direction, seen by a camera; its image holds a third of it."""
    place = torch.from_numpy(level_directions(height)).float() @ camera_to_level.T
    depth = 3 + place[..., 0] + 0.5 * place[..., 1] * place[..., 2] + 0.8 * place[..., 2]
    return (depth / 6).expand(3, -1, -1).contiguous(), depth[None]


def about_y(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def room(tilt_deg):
    camera_to_level = about_y(tilt_deg)
    sharp, _ = world(2 * HEIGHT, camera_to_level)
    image, depth = world(HEIGHT, camera_to_level)
    level_image, level_depth = world(HEIGHT, torch.eye(3))
    whole = torch.ones(1, HEIGHT, 2 * HEIGHT, dtype=torch.bool)
    return TiltedRoom(sharp, camera_to_level[2], image, depth, whole, level_image, level_depth, whole)


def exact_where_level(image):
    """Right in a level image, and the more wrong the farther the scene is from level: its image is known by its brightest row."""
    depth = 6 * image.mean(1, keepdim=True)
    off = (image - world(HEIGHT, torch.eye(3))[0]).abs().mean()
    return depth * (1 + 2 * off)


def test_the_true_up_recovers_everything_and_none_of_it_nothing():
    rows = score_ways(
        [room(20), room(30)], lambda image: torch.tensor([0.0, 0.0, 1.0]), exact_where_level, lambda: DepthMetrics("unifuse")
    )
    by_way = {row["way"]: row for row in rows}
    assert list(by_way) == ["direct", "levelled", "levelled, true up", "seen level"]
    assert by_way["direct"]["abs_rel"] > 0.05
    assert by_way["seen level"]["abs_rel"] < 1e-5
    assert by_way["levelled"]["recovered_percent"] == pytest.approx(0, abs=3)
    assert by_way["levelled, true up"]["recovered_percent"] == pytest.approx(100, abs=3)
    assert {row["images"] for row in rows} == {2}


def test_depth_comes_back_to_where_it_was_seen():
    tilted = room(35)
    depth = depth_by_levelling(tilted.sharp[None], tilted.up, lambda image: 6 * image.mean(1, keepdim=True))
    torch.testing.assert_close(depth[0], tilted.depth, rtol=0, atol=0.02)
    wrong = depth_by_levelling(tilted.sharp[None], tilted.up, exact_where_level)
    torch.testing.assert_close(wrong[0], tilted.depth, rtol=0, atol=0.05)
