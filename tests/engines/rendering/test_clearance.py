"""Where the camera stands: distances to walls, furniture and ceiling measured in the finished scene, in float64."""

from dataclasses import replace

import numpy as np
import pytest

from lightning_plugins.engines.rendering import HELD_OUT_ROOMS, SHAPES, TRAINING_ROOMS, sampling
from lightning_plugins.engines.rendering.render import room_scene
from tests.engines.rendering.triangle_oracle import yaw_matrix

SEEDS = range(80)


@pytest.fixture
def furniture(monkeypatch):
    """The boxes of furniture of the newest scene; the scene itself does not tell them from beams and lamps."""
    boxes = []

    def recording(*arguments):
        pieces = furnish(*arguments)
        boxes[:] = [box for piece in pieces for box in piece]
        return pieces

    furnish = sampling.furnish
    monkeypatch.setattr(sampling, "furnish", recording)
    return boxes


def distance_from_above(box, camera):
    """Return the distance of the camera from a box in the plan."""
    local = (np.subtract(camera, box.centre_m) @ yaw_matrix(box.yaw_rad))[:2]
    return np.hypot(*np.maximum(np.abs(local) - box.half_m[:2], 0.0))


@pytest.mark.parametrize("clearance_m", [0.9, 0.5])
@pytest.mark.parametrize("base", [TRAINING_ROOMS, HELD_OUT_ROOMS], ids=["training", "held out"])
def test_the_camera_keeps_its_distance_from_walls_and_furniture(base, clearance_m, furniture):
    distribution = replace(base, camera_clearance_m=clearance_m)
    nearest = []
    for seed in SEEDS:
        scene = room_scene(seed, distribution)
        walls = [plane.offset_m - np.dot(plane.normal, scene.camera_m) for plane in scene.planes[1:5]]
        if scene.shape.endswith("l_shaped"):
            walls.append(distance_from_above(scene.solids[0], scene.camera_m))
        # Frames and curtains stand out from walls: these keep 0.1 m more.
        assert min(walls) >= clearance_m + 0.1 - 1e-9, seed
        nearest += [distance_from_above(box, scene.camera_m) for box in furniture]
        assert min(nearest, default=np.inf) >= clearance_m - 1e-9, seed
        above = [plane.offset_m - np.dot(plane.normal, scene.camera_m) for plane in scene.planes[5:]]
        assert min(above) >= 0.7 - 1e-9, seed
    assert len(nearest) > 200
    assert min(nearest) < clearance_m + 0.2, "furniture comes as near as it may"


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.endswith("l_shaped")])
def test_a_notch_is_a_box_in_the_narrowest_rooms(shape):
    narrow = replace(
        TRAINING_ROOMS, shapes=(shape,), length_m=(2.5, 2.6), width_m=(2.5, 2.5), camera_clearance_m=1.09, hall_share=0.0
    )
    for seed in SEEDS:
        assert min(room_scene(seed, narrow).solids[0].half_m) > 0
