"""Angles that the test chose itself."""

import math

import pytest
import torch

from lightning_plugins.models.panoramic_upright.orientation_metrics import UpErrors


def turned(degrees):
    """+z, and it turned by so many degrees."""
    angles = [math.radians(angle) for angle in degrees]
    return torch.tensor([[math.sin(angle), 0.0, math.cos(angle)] for angle in angles], dtype=torch.float64)


def test_shares_mean_and_median():
    degrees = [0.5, 1.5, 2.5, 4.0, 10.0, 179.0, 0.01]
    level = torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64)
    metric = UpErrors()
    for part in (degrees[:4], degrees[4:]):
        metric.update(turned(part), level.expand(len(part), 3))
    figures = {name: figure.item() for name, figure in metric.compute().items()}
    shares = {"within_1_deg": 2 / 7, "within_2_deg": 3 / 7, "within_3_deg": 4 / 7, "within_5_deg": 5 / 7, "within_12_deg": 6 / 7}
    assert figures == pytest.approx({**shares, "mean_deg": sum(degrees) / 7, "median_deg": 2.5}, rel=1e-9)


def test_the_median_of_an_even_number_lies_between_the_two_in_the_middle():
    metric = UpErrors()
    metric.update(turned([1.0, 2.0, 4.0, 50.0]), turned([0.0]).expand(4, 3))
    assert metric.compute()["median_deg"].item() == pytest.approx(3.0)


def test_single_precision_tells_small_angles():
    metric = UpErrors()
    metric.update(turned([0.01]).float(), turned([0.0]).float())
    assert metric.compute()["mean_deg"].item() == pytest.approx(0.01, rel=1e-3)
