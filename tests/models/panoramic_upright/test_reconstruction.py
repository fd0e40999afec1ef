"""The refiner, the gate and the discriminator, on images that the test knows in closed form."""

import math

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import rotate_equirectangular, rotation_from_up
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable
from lightning_plugins.models.panoramic_upright.reconstruction import (
    PatchDiscriminator,
    UprightReconstruction,
    refined_is_nearer,
)
from lightning_plugins.models.panoramic_upright.reconstruction_metrics import psnr_db
from tests.models.panoramic_upright.tilted_rooms import up_vectors

WAVES = np.random.default_rng(0).normal(size=(3, 24, 3))


def scene(directions, frequency=6.0):
    """Three colours of every direction ``(..., 3)``: sums of waves in space, as fine as the frequency says; numpy, float64."""
    phases = np.einsum("...k,cnk->...cn", directions, WAVES)
    return np.moveaxis(0.5 + 0.08 * np.sin(frequency * phases + np.arange(24)).sum(-1), -1, 0)


def level_directions(height):
    colatitude = (np.arange(height)[:, None] + 0.5) / height * math.pi
    longitude = (np.arange(2 * height) + 0.5) / height * math.pi - math.pi
    parts = np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude), np.cos(colatitude)
    return np.stack(np.broadcast_arrays(*parts), -1)


def rodrigues(up):
    """The smallest rotation that takes up to +z, by its axis and angle."""
    axis = np.cross(up, [0.0, 0.0, 1.0])
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.linalg.norm(axis), up[2]
    return np.eye(3) + sine * cross + (1 - cosine) * cross @ cross


def photographs(seeds, height=32, frequency=6.0):
    """Tilted images, their up-vectors and the true level images, none of them interpolated."""
    ups = up_vectors(seeds)
    level = torch.from_numpy(scene(level_directions(height), frequency)).float().clamp(0, 1)
    # In direction d a tilted camera sees what stands in direction R d of the level frame.
    tilted = [scene(level_directions(height) @ rodrigues(up).T, frequency) for up in ups.double().numpy()]
    return torch.from_numpy(np.stack(tilted)).float().clamp(0, 1), ups, level.expand(len(ups), -1, -1, -1)


def awake(reconstruction, scale=0.05):
    """Weights in the last layer, as if it had been trained."""
    torch.nn.init.normal_(reconstruction.refine[-1].weight, std=scale)
    return reconstruction.eval()


def test_begins_as_plain_resampling_that_is_right():
    image, up, level = photographs(range(4), frequency=1.5)
    plain, refined = UprightReconstruction()(image, AnalyticLookupTable(32, 64)(up))
    assert torch.equal(plain, refined)
    assert (plain - level).abs().max() < 0.02
    assert (rotate_equirectangular(image, torch.eye(3)) - level).abs().max() > 0.2, "the tilt can be seen"


def test_learns_to_put_back_what_reading_blurs():
    torch.manual_seed(0)
    reconstruction, table = UprightReconstruction(), AnalyticLookupTable(32, 64)
    optimizer = torch.optim.Adam(reconstruction.parameters(), lr=3e-3)
    for step in range(60):
        image, up, level = photographs(range(4 * step, 4 * step + 4))
        _, refined = reconstruction(image, table(up))
        optimizer.zero_grad()
        (refined - level).square().mean().backward()
        optimizer.step()
    image, up, level = photographs(range(1000, 1008))
    with torch.no_grad():
        plain, refined = reconstruction(image, table(up))
    gain_db = psnr_db(refined, level) - psnr_db(plain, level)
    assert gain_db.min() > 0.1, gain_db
    assert gain_db.mean() > 0.25, gain_db
    assert refined_is_nearer(image, up, plain, refined).all()


def test_turning_the_camera_turns_the_level_image():
    torch.manual_seed(0)
    reconstruction, table = awake(UprightReconstruction(), 0.3).double(), AnalyticLookupTable(16, 32).double()
    image, up = torch.rand(2, 3, 16, 32, dtype=torch.float64), up_vectors([0, 1]).double()
    found = reconstruction(image, table(up))
    for columns in (1, 16, 27):
        turn = -2 * math.pi * columns / 32
        yaw = torch.tensor(
            [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]], dtype=torch.float64
        )
        turned = reconstruction(image.roll(columns, 3), table(up @ yaw.T))
        for one, other in zip(turned, found, strict=True):
            torch.testing.assert_close(one, other.roll(columns, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("error_deg", [0.0, 10.0])
def test_the_gate_takes_what_comes_back_nearer(error_deg):
    """Also with a wrong angle, which blurs no less."""
    image, up, _ = photographs(range(6), height=64, frequency=10.0)
    turn = math.radians(error_deg)
    up = up @ torch.tensor([[math.cos(turn), 0, -math.sin(turn)], [0, 1, 0], [math.sin(turn), 0, math.cos(turn)]])
    # What a camera with these up-vectors would have called level.
    sharp = torch.stack(
        [
            torch.from_numpy(scene(level_directions(64) @ rodrigues(one) @ rodrigues(true).T, 10.0)).float().clamp(0, 1)
            for one, true in zip(up.double().numpy(), up_vectors(range(6)).double().numpy(), strict=True)
        ]
    )
    plain = rotate_equirectangular(image, rotation_from_up(up))
    assert refined_is_nearer(image, up, plain, sharp).all()
    assert not refined_is_nearer(image, up, sharp, plain).any()
    torch.manual_seed(0)
    invented = sharp + 0.05 * torch.randn_like(sharp)
    assert not refined_is_nearer(image, up, plain, invented).any()
    mixed = torch.where(torch.arange(6)[:, None, None, None] % 2 == 0, sharp, invented)
    assert refined_is_nearer(image, up, plain, mixed).tolist() == [True, False] * 3


def test_the_gate_weighs_the_sphere_and_keeps_the_plain_one_within_its_margin():
    image = torch.zeros(1, 3, 32, 64)
    up = torch.tensor([[0.0, 0.0, 1.0]])
    plain, refined = image + 0.1, image + 0.1
    assert not refined_is_nearer(image, up, plain, refined).any()
    assert refined_is_nearer(image, up, plain, 0.9 * refined).all()
    assert not refined_is_nearer(image, up, plain, 0.9 * refined, margin=0.2).any()
    # Worse by half in the sixteen rows about the poles, which are 1 - cos(45 degrees) of the sphere, better elsewhere.
    refined = 0.9 * refined
    refined[:, :, :8] *= 1.25
    refined[:, :, -8:] *= 1.25
    squares = np.full(32, 0.81)
    squares[:8] = squares[-8:] = (0.9 * 1.25) ** 2
    edges = np.cos(np.linspace(0, math.pi, 33))
    expected = float((squares * (edges[:-1] - edges[1:])).sum() / 2)
    assert squares.mean() > 1.03 > 1 > expected, "weights decide"
    assert refined_is_nearer(image, up, plain, refined, margin=0.0).all()
    for margin, taken in ((1 - expected - 0.02, True), (1 - expected + 0.02, False)):
        assert refined_is_nearer(image, up, plain, refined, margin=margin).item() is taken


def test_candidates_of_another_size_than_the_image():
    image, up, _ = photographs(range(2), height=64)
    sharp = torch.from_numpy(scene(level_directions(32))).float().clamp(0, 1).expand(2, -1, -1, -1)
    assert refined_is_nearer(image, up, sharp + 0.05, sharp).all()


def test_the_discriminator_sees_patches_across_the_seam():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(4).double()
    image = torch.rand(1, 3, 32, 64, dtype=torch.float64, requires_grad=True)
    scores = discriminator(image)
    assert scores.shape == (1, 1, 8, 16)
    torch.testing.assert_close(discriminator(image.roll(12, 3)), scores.roll(3, 3), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(scores[0, 0, 4, 8], image)
    touched = gradient.abs().sum((0, 1)) > 0
    assert (int(touched.any(1).sum()), int(touched.any(0).sum())) == (18, 18)


def test_bad_options_are_refused():
    for options in ({"features": 0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="features and hidden must be 1 or more channels, got"):
            UprightReconstruction(**options)
