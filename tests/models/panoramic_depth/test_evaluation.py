"""The trivial predictors and the score against loops over pixels in numpy."""

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_depth.baselines import trivial_predictors
from lightning_plugins.models.panoramic_depth.evaluation import score


def test_trivial_predictors_are_the_medians_of_what_is_valid():
    generator = np.random.default_rng(0)
    depth_m = generator.uniform(1, 9, (5, 4, 8)).astype(np.float32)
    mask = generator.random((5, 4, 8)) > 0.3
    mask[:, 2] = False  # a row that was never measured takes the median of all
    valid = sorted(float(d) for d, m in zip(depth_m.ravel(), mask.ravel(), strict=True) if m)
    overall = (valid[(len(valid) - 1) // 2] + valid[len(valid) // 2]) / 2
    got = trivial_predictors(np.where(mask, depth_m, np.nan).astype(np.float32), mask)
    assert got["constant_median"] == pytest.approx(np.full((4, 8), overall), rel=1e-6)
    for v in range(4):
        row = sorted(float(d) for d, m in zip(depth_m[:, v].ravel(), mask[:, v].ravel(), strict=True) if m)
        expected = (row[(len(row) - 1) // 2] + row[len(row) // 2]) / 2 if row else overall
        assert got["row_median"][v] == pytest.approx(np.full(8, expected), rel=1e-6)


def test_score_is_the_mean_over_all_images_of_all_batches():
    truth = torch.full((3, 1, 2, 4), 2.0)
    mask = torch.ones(3, 1, 2, 4, dtype=torch.bool)
    images = torch.tensor([3.0, 2.0, 2.5]).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    batches = [{"image": images[i], "depth": truth[i], "mask": mask[i]} for i in (slice(0, 2), slice(2, 3))]
    rows = score(
        {"seen": lambda image: image[:, :1], "two": lambda image: torch.full_like(image[:, :1], 2.0)}, batches, "unifuse"
    )
    assert [row["predictor"] for row in rows] == ["seen", "two"]
    assert rows[0]["images"] == 3
    assert rows[0]["abs_rel"] == pytest.approx((0.5 + 0 + 0.25) / 3)
    assert rows[1]["mae"] == 0
