"""Oracles: the published end colours of turbo, and OpenCV as the reader of the PNG bytes."""

import subprocess
import sys

import numpy as np
import pytest

from lightning_plugins.reporting.figures import curves, depth_preview, depth_to_rgb

cv2 = pytest.importorskip("cv2")

# Turbo's last and first entry as published (Mikhailov 2019), and inferno's first (matplotlib), each in [0, 1].
NEAREST = np.array([0.4796, 0.01583, 0.01055]) * 255
FARTHEST = np.array([0.18995, 0.07176, 0.23217]) * 255
NO_ERROR = np.array([0.001462, 0.000466, 0.013866]) * 255
GREY = np.array([150, 150, 150])


def decode(png):
    return cv2.imdecode(np.frombuffer(png, dtype=np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


def count_colour(picture, colour):
    return int((np.abs(picture - np.asarray(colour, dtype=np.float64)) < 1).all(axis=-1).sum())


def test_scale_is_fixed_and_holes_are_grey():
    depth_m = np.array([[1.0, 0.2, 9.0, 50.0, np.nan, 5.0]])
    mask = np.array([[True, True, True, True, True, False]])
    rgb = depth_to_rgb(depth_m, 1.0, 9.0, mask)
    assert rgb.dtype == np.uint8
    np.testing.assert_allclose(rgb[0], [NEAREST, NEAREST, FARTHEST, FARTHEST, GREY, GREY], atol=1)


def test_the_same_depth_has_the_same_colour_in_every_picture():
    near = depth_to_rgb(np.array([[2.0, 3.0]]), 0, 10)
    far = depth_to_rgb(np.array([[2.0, 30.0]]), 0, 10)
    assert near[0, 0].tolist() == far[0, 0].tolist() != near[0, 1].tolist()


def test_an_empty_scale_is_refused():
    with pytest.raises(ValueError, match=r"far_m must exceed near_m, got 2\.0 to 2\.0"):
        depth_to_rgb(np.ones((2, 4)), 2.0, 2.0)


def test_preview_shows_prediction_and_truth_in_one_scale_and_the_error():
    image = np.full((32, 64, 3), [1, 200, 77], dtype=np.uint8)
    constant = np.full((32, 64), 3.0)
    colour = depth_to_rgb(constant, 0, 10)[0, 0].tolist()
    alone = decode(depth_preview(image, constant))
    both = decode(depth_preview(image, constant, constant, title="a <b> $x$"))
    # The panel of the pair is smaller than the one alone; two of them make up the count.
    panel = count_colour(both, [1, 200, 77])
    assert panel > 50_000
    assert count_colour(alone, colour) >= count_colour(alone, [1, 200, 77]) * 0.95
    assert count_colour(both, colour) == pytest.approx(2 * panel, rel=0.05)
    assert count_colour(both, NO_ERROR) == pytest.approx(panel, rel=0.05)


def test_preview_greys_the_holes_of_truth_and_error_alone():
    depth_m = np.full((32, 64), 3.0)
    mask = np.ones((32, 64), dtype=bool)
    mask[16:] = False
    picture = decode(depth_preview(np.full((32, 64, 3), 99, np.uint8), depth_m, depth_m, mask))
    panel = count_colour(picture, NO_ERROR) * 2
    assert count_colour(picture, GREY) == pytest.approx(panel, rel=0.05)


def test_pictures_are_reproducible():
    depth_m = np.random.default_rng(0).uniform(0, 10, (16, 32))
    image = np.zeros((16, 32, 3), np.uint8)
    assert depth_preview(image, depth_m, depth_m + 1) == depth_preview(image, depth_m, depth_m + 1)


def test_curves_have_a_line_of_panels_for_each_phase():
    rows = [{"phase": "teacher", "step": str(step), "train/loss": "1.5"} for step in range(150)]
    one = decode(curves(rows))
    two = decode(curves(rows + [{"phase": "student", "step": "9", "train/loss": "nan", "val/abs_rel": 0.5}]))
    assert two.shape[0] == 2 * one.shape[0]


@pytest.mark.parametrize("rows", [[], [{"phase": "student", "epoch": "0", "step": "1", "learning_rate": "0.1"}]])
def test_no_curves_without_losses_and_errors(rows):
    assert curves(rows) is None


def test_pyplot_stays_out():
    code = (
        "import sys, numpy as np; from lightning_plugins.reporting.figures import depth_preview\n"
        "depth_preview(np.zeros((4, 8, 3), np.uint8), np.ones((4, 8)))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
