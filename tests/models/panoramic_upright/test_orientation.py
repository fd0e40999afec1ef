"""Votes, losses and uncertainty of the orientation network, against formulas and numbers of the tests' own."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from lightning_plugins._support.errors import InputError
from lightning_plugins.models.panoramic_upright.orientation import (
    OrientationNetwork,
    _sum_votes,
    expected_error_deg,
    geodesic_distance,
    von_mises_fisher_loss,
)


def small_network():
    torch.manual_seed(0)
    return OrientationNetwork((8, 12), blocks=1, bins=8, cell=1).eval()


def test_turning_the_camera_turns_the_estimate():
    network = small_network().double()
    image = torch.rand(2, 3, 16, 32, dtype=torch.float64)
    found = network(image)
    for columns in (4, 12, 28):
        # The scene moves to the right: clockwise, seen from above.
        turn = -2 * math.pi * columns / 32
        matrix = [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]]
        turned = network(image.roll(columns, dims=3))
        torch.testing.assert_close(turned, found @ torch.tensor(matrix, dtype=torch.float64).T, rtol=1e-9, atol=1e-12)


def test_a_vote_in_each_direction():
    """By hand: at the centre of the image east is -y, south is -z and outward is +x; the weight is the solid angle."""
    votes = torch.zeros(1, 3, 2, 4, dtype=torch.float64)
    # Of two rows none is on the equator: two votes for south that are mirror images of each other leave the vertical part.
    votes[0, 1, 0, :] = votes[0, 1, 1, :] = 1.0
    solid_angle = 4 * math.pi / 8
    expected = [0.0, 0.0, -8 * solid_angle * math.sin(math.pi / 4)]
    torch.testing.assert_close(_sum_votes(votes)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    votes.zero_()
    votes[0, 0, :, 1] = 1.0  # east, at a longitude of -45 degrees, both rows
    expected = [2 * solid_angle * math.sin(math.pi / 4), -2 * solid_angle * math.cos(math.pi / 4), 0.0]
    torch.testing.assert_close(_sum_votes(votes)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    votes.zero_()
    votes[0, 2, 0, 2] = 1.0  # outward, 45 degrees up and 45 degrees to the right
    expected = [0.5 * solid_angle, -0.5 * solid_angle, math.sin(math.pi / 4) * solid_angle]
    torch.testing.assert_close(_sum_votes(votes)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_learns_what_can_be_seen():
    """A bright side: a network of random weights learns in a few steps to point at it, wherever it is."""
    torch.manual_seed(0)
    network = OrientationNetwork((8, 12), blocks=1, cell=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    colatitude = torch.linspace(0, math.pi, 33)[:-1] + math.pi / 64
    longitude = torch.linspace(-math.pi, math.pi, 65)[:-1] + math.pi / 64
    x, y = colatitude.sin()[:, None] * longitude.cos(), -colatitude.sin()[:, None] * longitude.sin()
    places = torch.stack([x, y, colatitude.cos()[:, None].expand(32, 64)])
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        up = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
        return (0.5 + 0.5 * torch.einsum("bc,chw->bhw", up, places))[:, None].expand(-1, 3, -1, -1).contiguous(), up

    for _ in range(60):
        image, up = draw(16)
        optimizer.zero_grad()
        von_mises_fisher_loss(network(image), up).backward()
        optimizer.step()
    image, up = draw(64)
    with torch.no_grad():
        vector = network(image)
    errors = torch.rad2deg(geodesic_distance(vector, up))
    assert errors.median() < 5
    assert expected_error_deg(vector).median() < 20


def test_small_and_large_angles():
    for degrees in (1e-4, 1.0, 90.0, 179.0, 179.9999):
        angle = math.radians(degrees)
        one = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
        other = torch.tensor([math.sin(angle), 0.0, math.cos(angle)], dtype=torch.float64, requires_grad=True)
        found = geodesic_distance(one, other)
        assert math.degrees(found.item()) == pytest.approx(degrees, rel=1e-6)
        (gradient,) = torch.autograd.grad(found, other)
        assert gradient.norm().item() == pytest.approx(1.0, rel=1e-6)
    same = torch.tensor([0.0, 3.0, 0.0], requires_grad=True)
    assert geodesic_distance(same, same.detach()).item() == 0.0
    assert torch.autograd.grad(geodesic_distance(same, same.detach()), same)[0].isfinite().all()


@pytest.mark.parametrize("kappa", [1e-3, 0.7, 8.0, 400.0])
def test_the_density_is_one_and_its_spread_is_that_which_is_told(kappa):
    """Integrated over the angle by scipy; the density is read off the loss."""
    vector = torch.tensor([[0.0, 0.0, kappa]], dtype=torch.float64)

    def density(angle):
        up = torch.tensor([[math.sin(angle), 0.0, math.cos(angle)]], dtype=torch.float64)
        return math.exp(-von_mises_fisher_loss(vector, up).item()) * 2 * math.pi * math.sin(angle)

    spread = math.pi if kappa < 1 else min(math.pi, 12 / math.sqrt(kappa))
    assert integrate.quad(density, 0, spread)[0] == pytest.approx(1, abs=1e-5)
    square, _ = integrate.quad(lambda angle: density(angle) * (2 - 2 * math.cos(angle)), 0, spread)
    expected = math.degrees(2 * math.asin(math.sqrt(square) / 2))
    assert expected_error_deg(vector).item() == pytest.approx(expected, rel=1e-3)


def test_without_any_vote_every_direction_is_as_likely():
    vector = torch.zeros(2, 3, requires_grad=True)
    loss = von_mises_fisher_loss(vector, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(4 * math.pi), abs=1e-3)
    assert torch.autograd.grad(loss, vector)[0].isfinite().all()
    assert expected_error_deg(vector.detach()).numpy() == pytest.approx(np.full(2, 90.0), abs=0.1)


def test_bad_values_are_refused():
    with pytest.raises(InputError, match="widths must be positive"):
        OrientationNetwork(())
    network = small_network()
    for shape in ((1, 3, 18, 36), (1, 1, 16, 32), (3, 16, 32)):
        with pytest.raises(InputError, match=r"image must have shape \(B, 3, H, W\) with H and W divisible by 4"):
            network(torch.zeros(shape))
