"""Rows of scores against counts by hand."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_upright.evaluation import errors_deg, identity, rivals, score


def tilted(degrees):
    return torch.tensor([math.sin(math.radians(degrees)), 0.0, math.cos(math.radians(degrees))])


def test_rows_count_the_images_within_each_limit():
    tilts = (0.0, 0.5, 1.5, 4.2, 30.0, 180.0)
    image = torch.zeros(3, 32, 64)
    seen = []

    def half(image):
        seen.append(image)
        return tilted(tilts[len(seen) - 1] / 2)

    errors = errors_deg({"identity": identity, "half": half}, ((image, tilted(tilt)) for tilt in tilts))
    np.testing.assert_allclose(errors["identity"], tilts, atol=1e-4)
    np.testing.assert_allclose(errors["half"], np.array(tilts) / 2, atol=1e-4)
    rows = score(errors, "small")
    columns = ["predictor", "tilt", *(f"within_{limit}_deg" for limit in (1, 2, 3, 5, 12)), "mean_deg", "images"]
    assert list(rows[0]) == columns
    assert list(rows[0].values()) == ["identity", "small", 33.3, 50.0, 50.0, 66.7, 66.7, 36.033, 6]
    assert list(rows[1].values()) == ["half", "small", 50.0, 50.0, 66.7, 66.7, 66.7, 18.017, 6]
    assert list(score(errors, "sphere", (0.5, 90))[0]) == [
        "predictor",
        "tilt",
        "within_0.5_deg",
        "within_90_deg",
        "mean_deg",
        "images",
    ]


def test_lines_without_a_cue_leave_an_image_as_it_is():
    pytest.importorskip("cv2")
    assert rivals("small")["lines"](torch.full((3, 64, 128), 0.5)).tolist() == [0, 0, 1]
    assert rivals("sphere")["identity"](torch.zeros(3, 64, 128)).tolist() == [0, 0, 1]
