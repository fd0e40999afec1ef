"""The presets against four-pixel cases worked out by hand."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_depth.metrics import NAMES, PRESETS, DepthMetrics, image_metrics


def figures(prediction, depth, preset, mask=None):
    prediction, depth = (torch.tensor(x, dtype=torch.float64).view(2, 2) for x in (prediction, depth))
    mask = torch.ones(2, 2, dtype=torch.bool) if mask is None else torch.tensor(mask).view(2, 2)
    return dict(zip(NAMES, image_metrics(prediction, depth, mask, PRESETS[preset]).tolist(), strict=True))


def test_unifuse_by_hand():
    # Errors 0.2, 0.5, 1, 0; ratios 1.2, 1.5, 4/3, 1.
    got = figures([1.2, 1.0, 4.0, 2.0], [1.0, 1.5, 3.0, 2.0], "unifuse")
    assert got["abs_rel"] == pytest.approx((0.2 + 1 / 3 + 1 / 3 + 0) / 4)
    assert got["mae"] == pytest.approx(1.7 / 4)
    assert got["rmse"] == pytest.approx(math.sqrt((0.04 + 0.25 + 1) / 4))
    logs = [math.log10(1.2), math.log10(1 / 1.5), math.log10(4 / 3), 0]
    assert got["rmse_log"] == pytest.approx(math.sqrt(sum(x * x for x in logs) / 4))
    assert (got["delta1"], got["delta2"], got["delta3"]) == (0.5, 1.0, 1.0)


def test_omnifusion_takes_the_natural_logarithm():
    args = ([1.2, 1.0, 4.0, 2.0], [1.0, 1.5, 3.0, 2.0])
    assert figures(*args, "omnifusion_ln")["rmse_log"] == pytest.approx(figures(*args, "unifuse")["rmse_log"] * math.log(10))


def test_the_unifuse_slip_moves_the_truth_where_the_prediction_is_beyond_ten_metres():
    # Predicting 12 for 4 is scored as 12 against 10, not as 12 (or 10) against 4.
    got = figures([12.0, 1, 1, 1], [4.0, 1, 1, 1], "unifuse")
    assert got["mae"] == pytest.approx(2 / 4)
    assert got["abs_rel"] == pytest.approx(0.2 / 4)
    assert figures([12.0, 1, 1, 1], [4.0, 1, 1, 1], "omnifusion_ln")["mae"] == pytest.approx(8 / 4)


def test_both_depths_are_raised_to_the_floor():
    got = figures([0.0, 1, 1, 1], [0.05, 1, 1, 1], "unifuse")
    assert got["mae"] == 0
    assert got["rmse_log"] == 0


@pytest.mark.parametrize("hole", [0.0, math.nan, math.inf, 65535 / 512, 10.5])
def test_holes_do_not_count(hole):
    got = figures([3.0, 1, 1, 1], [hole, 2.0, 1, 1], "unifuse")
    assert got["mae"] == pytest.approx(1 / 3)


def test_the_mask_is_obeyed():
    assert figures([3.0, 1, 1, 1], [1.0, 2.0, 1, 1], "unifuse", mask=[False, True, True, True])["mae"] == pytest.approx(1 / 3)


def test_alignment_removes_a_scale():
    assert figures([2.0, 4, 6, 8], [1.0, 2, 3, 4], "aligned")["mae"] == pytest.approx(0)
    assert figures([2.0, 4, 6, 8], [1.0, 2, 3, 4], "bifuse")["mae"] == pytest.approx(0)
    assert figures([2.0, 4, 6, 8], [1.0, 2, 3, 4], "unifuse")["mae"] > 2


def test_bifuse_excludes_ten_metres_itself():
    assert figures([1.0, 1, 1, 1], [10.0, 1, 1, 1], "bifuse")["mae"] == 0
    assert figures([1.0, 1, 1, 1], [10.0, 1, 1, 1], "unifuse")["mae"] == pytest.approx(9 / 4)


def test_spherical_weights_rows_by_their_solid_angle():
    prediction, depth = np.ones((4, 8)), np.ones((4, 8))
    prediction[0] = 2.0  # the row from the zenith to 45 degrees: (1 - cos 45) / 2 of the sphere
    mask = torch.ones(4, 8, dtype=torch.bool)
    got = image_metrics(torch.from_numpy(prediction), torch.from_numpy(depth), mask, PRESETS["spherical"])[1]
    assert float(got) == pytest.approx((1 - math.cos(math.pi / 4)) / 2, rel=1e-6)


def test_is_the_mean_over_images_and_skips_empty_ones():
    metric = DepthMetrics("unifuse")
    depth = torch.ones(3, 1, 2, 2)
    mask = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    mask[2] = False
    metric.update(torch.tensor([1.5, 2.0, 9.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2), depth, mask)
    assert float(metric.compute()["mae"]) == pytest.approx((0.5 + 1.0) / 2)
    assert int(metric.images) == 2


def test_a_prediction_of_nan_is_not_passed_over():
    metric = DepthMetrics("unifuse")
    metric.update(torch.full((1, 1, 2, 2), math.nan), torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert int(metric.images) == 1
    assert metric.compute()["mae"].isnan()


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="got 'unifus'; did you mean unifuse"):
        DepthMetrics("unifus")
