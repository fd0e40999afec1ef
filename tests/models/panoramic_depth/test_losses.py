"""Oracles: berHu and the distances written as loops over pixels in float64 numpy."""

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_depth.losses import DISTANCES, berhu, berhu_log, distillation


def berhu_by_hand(prediction, depth, mask, threshold=0.2):
    per_image = []
    for p, d, m in zip(prediction.numpy(), depth.numpy(), mask.numpy(), strict=True):
        errors = [abs(float(a) - float(b)) for a, b, valid in zip(p.ravel(), d.ravel(), m.ravel(), strict=True) if valid]
        c = threshold * max(errors)
        per_image.append(np.mean([e if e <= c else (e * e + c * c) / (2 * c) for e in errors]))
    return np.mean(per_image)


@pytest.fixture
def depths():
    generator = torch.Generator().manual_seed(0)
    prediction = 5 * torch.rand(4, 1, 6, 12, dtype=torch.float64, generator=generator)
    depth = 5 * torch.rand(4, 1, 6, 12, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 1, 6, 12, generator=generator) > 0.3
    return prediction, depth, mask


def test_berhu_equals_the_loop(depths):
    assert float(berhu(*depths)) == pytest.approx(berhu_by_hand(*depths), rel=1e-12)


def test_berhu_log_is_berhu_of_logarithms(depths):
    prediction, depth, mask = depths
    prediction, depth = prediction + 0.1, depth + 0.1
    logs = (torch.from_numpy(np.log(prediction.numpy())), torch.from_numpy(np.log(depth.numpy())), mask)
    assert float(berhu_log(prediction, depth, mask)) == pytest.approx(berhu_by_hand(*logs), rel=1e-12)
    assert torch.isfinite(berhu_log(prediction, torch.where(mask, depth, 0.0), mask))


def test_batch_is_the_mean_of_its_shards(depths):
    shards = [berhu(*(x[i : i + 2] for x in depths)) for i in (0, 2)]
    assert float(berhu(*depths)) == pytest.approx(float(sum(shards)) / 2, rel=1e-12)


def test_holes_are_never_read(depths):
    prediction, depth, mask = depths
    prediction.requires_grad_()
    loss = berhu(prediction, torch.where(mask, depth, torch.nan), mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(prediction.grad).all()
    assert (prediction.grad[~mask] == 0).all()


def test_an_image_without_depth_costs_nothing(depths):
    prediction, depth, mask = depths
    assert float(berhu(prediction, depth, torch.zeros_like(mask))) == 0


def test_distances_equal_the_loops():
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.randn(2, 5, 4, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 4, 8, generator=generator) > 0.4
    expected = {"l1": [], "cosine": [], "affinity": []}
    for a, b, m in zip(ours.numpy(), theirs.numpy(), mask.numpy()[:, 0], strict=True):
        cells = [(a[:, v, u], b[:, v, u]) for v in range(4) for u in range(8) if m[v, u]]
        expected["l1"].append(np.mean([np.abs(x - y).mean() for x, y in cells]))
        expected["cosine"].append(np.mean([1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in cells]))
        unit = [(x / np.linalg.norm(x), y / np.linalg.norm(y)) for x, y in cells]
        expected["affinity"].append(np.mean([abs(x @ x2 - y @ y2) for x, y in unit for x2, y2 in unit]))
    for name, distance in DISTANCES.items():
        assert float(distance(ours, theirs, mask.double())) == pytest.approx(np.mean(expected[name]), rel=1e-9), name


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_no_gradient_reaches_the_teacher(name):
    ours, theirs = (torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(2))
    distillation([ours], [theirs], torch.ones(2, 1, 8, 16, dtype=torch.bool), DISTANCES[name]).backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None
