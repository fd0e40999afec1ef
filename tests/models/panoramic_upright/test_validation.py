"""The figures of a validation, against what the test works out of the network's own answers, image by image."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_upright.network import Candidates
from lightning_plugins.models.panoramic_upright.validation import UprightFigures, gate_is_right
from tests.models.panoramic_upright.test_network import network
from tests.models.panoramic_upright.tilted_rooms import tilted, up_vectors


def decibels(prediction, truth):
    return float(-10 * np.log10(np.mean((prediction.double().numpy() - truth.double().numpy()) ** 2)))


@torch.no_grad()
def test_every_figure():
    torch.manual_seed(0)
    level, up = torch.nn.functional.interpolate(torch.rand(5, 3, 8, 16), scale_factor=2, mode="bilinear"), up_vectors(range(5))
    image, model, figures = tilted(level, up), network(), UprightFigures(refined=True)
    for part in (slice(0, 3), slice(3, 5)):
        figures.update(model, image[part], up[part], level[part])
    found = {name: float(figure) for name, figure in figures.compute().items()}
    predicted = torch.nn.functional.normalize(model.estimate(image), dim=-1)
    cosine = (predicted.double() * up.double()).sum(-1).clamp(-1, 1)
    assert found["mean_deg"] == pytest.approx(float(torch.rad2deg(torch.acos(cosine)).mean()), rel=1e-5)
    for angle, direction in (("true", up), ("predicted", predicted)):
        candidates = model.level(image, direction)
        for name in ("plain", "refined", "gated"):
            expected = [decibels(one, other) for one, other in zip(getattr(candidates, name), level, strict=True)]
            assert found[f"psnr_{name}_{angle}_db"] == pytest.approx(np.mean(expected), rel=1e-6)
            assert f"ws_psnr_{name}_{angle}_db" in found
    candidates = model.level(image, up)
    assert found["gate_refined_share"] == pytest.approx(float(candidates.took_refined.float().mean()))
    assert found["gate_precision"] == pytest.approx(float(gate_is_right(candidates, level).float().mean()))
    assert len(found) == 7 + 2 * 6 + 2


@torch.no_grad()
def test_begins_anew_and_reports_what_there_was():
    image, up = torch.rand(2, 3, 16, 32), up_vectors(range(2))
    model, figures, fresh = network(), UprightFigures(refined=True), UprightFigures(refined=True)
    figures.update(model, image, up, image)
    figures.compute()
    for each in (figures, fresh):
        each.update(model, image.flip(0), up, image)
    assert figures.compute() == fresh.compute()
    figures.update(model, image, up, None)
    assert not [name for name in figures.compute() if "psnr" in name or "gate" in name]
    assert not figures.state_dict()


@torch.no_grad()
def test_without_a_refiner_plain_resampling_is_all_there_is():
    image, up = torch.rand(2, 3, 16, 32), up_vectors(range(2))
    figures = UprightFigures(refined=False)
    figures.update(network(reconstruct=False), image, up, image)
    assert {name for name in figures.compute() if not name.endswith("_deg")} == {
        f"{kind}_plain_{angle}_db" for kind in ("psnr", "ws_psnr") for angle in ("true", "predicted")
    }


def test_the_gate_is_right_where_it_took_the_nearer_one():
    level = torch.full((5, 3, 8, 16), 0.5)
    errors = torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.1], [0.2, 0.1, 0.2, 0.1, 0.1]])[:, :, None, None, None]
    plain, refined = level + errors
    took = torch.tensor([False, True, True, False, True])
    right = gate_is_right(Candidates(plain, refined, plain, took), level)
    assert right.tolist() == [True, True, False, False, True]


def test_the_gate_is_judged_on_the_sphere():
    level = torch.zeros(1, 3, 16, 32)
    plain, refined = level + 0.1, level + 0.09
    refined[:, :, [0, 1, -2, -1]] = 0.14  # a quarter of the rows, 1 - cos(22.5 degrees) of the sphere
    assert float(refined.square().mean()) > 0.01
    weighted = 0.14**2 * (1 - math.cos(math.pi / 8)) + 0.09**2 * math.cos(math.pi / 8)
    assert weighted < 0.01
    assert gate_is_right(Candidates(plain, refined, refined, torch.tensor([True])), level).tolist() == [True]
