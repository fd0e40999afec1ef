"""Oracle: numpy in float64, pixel by pixel."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.models.panoramic_upright.reconstruction_losses import (
    adversarial_loss,
    discriminator_loss,
    edge_loss,
    reconstruction_l1,
)

SHAPE = (2, 3, 4, 8)


def weights(rows):
    edges = np.cos(np.linspace(0, math.pi, rows + 1))
    return (edges[:-1] - edges[1:]) / (edges[:-1] - edges[1:]).sum()


def spherical_mean(values):
    return float(np.mean(values, axis=(0, 1, 3)) @ weights(values.shape[2]))


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    return generator.random(SHAPE), generator.random(SHAPE)


def test_l1(images):
    found = reconstruction_l1(*map(torch.from_numpy, images)).item()
    assert found == pytest.approx(spherical_mean(np.abs(images[0] - images[1])), rel=1e-12)


def test_edges_are_compared_across_the_seam_too(images):
    across, down = np.zeros(SHAPE), np.zeros((*SHAPE[:2], SHAPE[2] - 1, SHAPE[3]))
    one, other = images
    for row in range(SHAPE[2]):
        for column in range(SHAPE[3]):
            right = (column + 1) % SHAPE[3]
            across[:, :, row, column] = np.abs(
                one[:, :, row, column] - one[:, :, row, right] - other[:, :, row, column] + other[:, :, row, right]
            )
            if row + 1 < SHAPE[2]:
                down[:, :, row, column] = np.abs(
                    one[:, :, row, column] - one[:, :, row + 1, column] - other[:, :, row, column] + other[:, :, row + 1, column]
                )
    found = edge_loss(*map(torch.from_numpy, images)).item()
    assert found == pytest.approx(spherical_mean(across) + spherical_mean(down), rel=1e-12)


def test_a_constant_offset_has_no_edges(images):
    truth = torch.from_numpy(images[0])
    assert edge_loss(truth + 0.2, truth).item() == pytest.approx(0, abs=1e-12)


def test_both_sides_of_the_adversary(images):
    true, made = (image[:, :1] for image in images)
    both = spherical_mean((true - 1) ** 2) + spherical_mean(made**2)
    assert discriminator_loss(torch.from_numpy(true), torch.from_numpy(made)).item() == pytest.approx(both, rel=1e-12)
    assert adversarial_loss(torch.from_numpy(made)).item() == pytest.approx(spherical_mean((made - 1) ** 2), rel=1e-12)
