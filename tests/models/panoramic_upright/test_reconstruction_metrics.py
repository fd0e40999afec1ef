"""Oracle: numpy in float64, row by row, with the solid angle as the difference of two cosines."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_upright.reconstruction_metrics import PanoramaPSNR, psnr_db


def oracle(prediction, truth, weighted):
    """One image ``(C, H, W)``."""
    rows = prediction.shape[1]
    edges = np.cos(np.linspace(0, math.pi, rows + 1))
    weight = edges[:-1] - edges[1:] if weighted else np.ones(rows)
    square = sum(weight[row] * np.mean((np.clip(prediction[:, row], 0, 1) - truth[:, row]) ** 2) for row in range(rows))
    return -10 * math.log10(square / weight.sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_numpy(weighted):
    generator = np.random.default_rng(0)
    truth = generator.random((2, 3, 6, 12))
    prediction = truth + generator.normal(0, 0.1, truth.shape)  # beyond [0, 1] too
    found = psnr_db(torch.from_numpy(prediction), torch.from_numpy(truth), weighted)
    expected = [oracle(one, other, weighted) for one, other in zip(prediction, truth, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_by_hand():
    truth = torch.zeros(1, 1, 4, 8)
    prediction = truth.clone()
    prediction[0, 0, 0] = 0.1  # the row from the zenith to 45 degrees
    assert psnr_db(prediction, truth).item() == pytest.approx(20 + 10 * math.log10(4))
    share = (1 - math.cos(math.pi / 4)) / 2
    assert psnr_db(prediction, truth, by_solid_angle=True).item() == pytest.approx(20 - 10 * math.log10(share))


def test_equal_images_have_a_hundred_decibels():
    image = torch.rand(2, 3, 4, 8)
    assert psnr_db(image, image).tolist() == pytest.approx([100, 100])


def test_the_metric_is_the_mean_over_images():
    generator = np.random.default_rng(1)
    truth = generator.random((5, 3, 6, 12))
    prediction = np.clip(truth + generator.normal(0, 0.1, truth.shape), 0, 1)
    metric = PanoramaPSNR()
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(torch.from_numpy(prediction[part]), torch.from_numpy(truth[part]))
    figures = metric.compute()
    for name, weighted in (("psnr_db", False), ("ws_psnr_db", True)):
        expected = np.mean([oracle(one, other, weighted) for one, other in zip(prediction, truth, strict=True)])
        assert figures[name].item() == pytest.approx(expected, rel=1e-12)


def test_a_prediction_of_nan_is_not_passed_over():
    metric = PanoramaPSNR()
    metric.update(torch.full((1, 3, 4, 8), math.nan), torch.zeros(1, 3, 4, 8))
    assert metric.compute()["psnr_db"].isnan()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must both have shape \(B, C, H, W\), got \(1, 3, 4, 8\) and \(1, 3, 8, 16\)"):
        psnr_db(torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 8, 16))
