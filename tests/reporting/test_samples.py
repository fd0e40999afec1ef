"""Oracle: errors worked out by hand on four pixels."""

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.reporting.samples import Sample, take_samples


def batch(size=3, **changes):
    maps = {
        "image": torch.full((size, 3, 2, 4), 0.5),
        "depth": torch.ones(size, 1, 2, 4),
        "mask": torch.ones(size, 2, 4, dtype=torch.bool),
    }
    return {**maps, "prediction": torch.full((size, 1, 2, 4), 2.0, dtype=torch.bfloat16, requires_grad=True), **changes}


def test_takes_the_first_ones_in_plain_arrays():
    samples = take_samples(batch(), 2, "f")
    assert len(samples) == 2
    assert samples[0].image.shape == (2, 4, 3)
    assert samples[0].image.dtype == np.uint8
    assert (samples[0].image == 128).all()
    assert samples[0].mask.dtype == bool
    assert samples[1].prediction_m.tolist() == [[2.0] * 4] * 2
    assert len(take_samples(batch(), 5, "f")) == 3


def test_errors_by_hand():
    image = np.zeros((1, 4, 3), np.uint8)
    truth, guess = np.array([[1.0, 2.0, 4.0, 9.0]]), np.array([[1.5, 2.0, 3.0, 0.0]])
    errors = Sample(image, truth, np.array([[True, True, True, False]]), guess).errors()
    assert errors == {"abs_rel": pytest.approx((0.5 + 0 + 0.25) / 3), "mae_m": pytest.approx(0.5)}
    assert np.isnan(Sample(image, truth, np.zeros((1, 4), bool), guess).errors()["mae_m"])


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            torch.tensor(1.0),
            "needs a dict with image, depth, mask and prediction from f, got Tensor; return those, or give PanoramaReport",
        ),
        (None, "got NoneType"),
        ({"loss": 1, "image": 2}, "got a dict with loss, image, without depth, mask, prediction; return those"),
        (batch(depth=torch.ones(3, 2, 2, 4)), r"got image \(3, 3, 2, 4\), depth \(3, 2, 2, 4\)"),
        (batch(prediction=torch.ones(3, 1, 4, 8)), r"prediction \(3, 1, 4, 8\); return those"),
    ],
)
def test_other_outputs_are_refused(output, sentence):
    with pytest.raises(InputError, match=sentence):
        take_samples(output, 2, "f")
