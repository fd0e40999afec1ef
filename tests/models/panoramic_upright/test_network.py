"""The three parts together: what comes out of the network, step by step and exported."""

import io
import math

import pytest
import torch

from lightning_plugins.engines.sphere import rotate_equirectangular, rotation_from_up, solid_angles
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable, fit_lookup_table
from lightning_plugins.models.panoramic_upright.network import UprightNetwork, unit_up
from lightning_plugins.models.panoramic_upright.orientation import OrientationNetwork, geodesic_distance
from lightning_plugins.models.panoramic_upright.reconstruction import UprightReconstruction
from tests.models.panoramic_upright.test_reconstruction import awake, level_directions
from tests.models.panoramic_upright.tilted_rooms import up_vectors


def bright_towards(up, height=16):
    """Images whose brightness grows towards up."""
    directions = torch.from_numpy(level_directions(height)).float()
    return (0.5 + 0.4 * torch.einsum("bc,hwc->bhw", up, directions))[:, None].expand(-1, 3, -1, -1).contiguous()


class Hesitant(torch.nn.Module):
    """Finds where an image is bright, and believes only 70 % of the tilt; the less tilt it sees, the surer it is, or the less."""

    def __init__(self, surer_when_level=True):
        super().__init__()
        self.surer_when_level = surer_when_level

    def forward(self, image):
        directions = torch.from_numpy(level_directions(image.shape[2])).float()
        weight = image.mean(1) * solid_angles(*image.shape[2:])[:, None]
        found = torch.nn.functional.normalize(torch.einsum("bhw,hwc->bc", weight, directions), dim=-1)
        tilt = torch.acos(found[:, 2:].clamp(-1, 1))
        across = torch.nn.functional.normalize(found[:, :2], dim=-1)
        sure = 50 - 40 * tilt if self.surer_when_level else 10 + 40 * tilt
        return sure * torch.cat([across * (0.7 * tilt).sin(), (0.7 * tilt).cos()], dim=-1)


def network(orientation=None, height=16, learned=False, refine_steps=0, reconstruct=True):
    torch.manual_seed(0)
    table = LearnedLookupTable(height, 2 * height, blocks=1) if learned else AnalyticLookupTable(height, 2 * height)
    if learned:
        fit_lookup_table(table)
    orientation = orientation or OrientationNetwork((8, 12), blocks=1)
    reconstruction = awake(UprightReconstruction()) if reconstruct else None
    return UprightNetwork(orientation, table, reconstruction, height, refine_steps).eval()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_looking_again_shrinks_an_error_that_grows_with_the_tilt(steps):
    up = up_vectors(range(4))
    tilt_deg = torch.rad2deg(torch.acos(up[:, 2]))
    vector = network(Hesitant(), 32, refine_steps=steps).estimate(bright_towards(up, 32))
    error_deg = torch.rad2deg(geodesic_distance(vector, up))
    torch.testing.assert_close(error_deg, tilt_deg * 0.3 ** (steps + 1), rtol=0.05, atol=0.05)
    torch.testing.assert_close(vector.norm(dim=-1), 50 - 40 * torch.deg2rad(tilt_deg) * 0.3**steps, rtol=0.01, atol=0.1)


def test_a_second_look_that_is_less_sure_does_not_count():
    image = bright_towards(up_vectors(range(4)))
    once, again = (network(Hesitant(surer_when_level=False), refine_steps=steps).estimate(image) for steps in (0, 2))
    assert torch.equal(once, again)


def test_large_images_are_looked_at_again_as_sharp_as_they_are():
    """Fine stripes across the sight survive a turn at the image's size, and do not one at the network's."""

    class Stripes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.deviations = []

        def forward(self, image):
            self.deviations.append(image.std())
            return torch.tensor([[0.3, 0.0, 1.0]]).expand(len(image), -1)

    columns = torch.arange(128)
    image = (0.5 + 0.4 * torch.sin(columns * (2 * torch.pi / 5))).expand(1, 3, 64, 128).contiguous()
    model = network(Stripes(), 32, refine_steps=1)
    model.estimate(image)
    first, second = model.orientation.deviations
    small = torch.nn.functional.avg_pool2d(image, 2)
    turned_small = rotate_equirectangular(small, rotation_from_up(torch.tensor([0.3, 0.0, 1.0])), "bicubic").std()
    assert first > second > 1.1 * turned_small


def test_does_not_look_again_in_training():
    up = up_vectors(range(2))
    refining = network(Hesitant(), refine_steps=3)
    once = network(Hesitant()).estimate(bright_towards(up))
    assert not torch.allclose(refining.estimate(bright_towards(up)), once)
    assert torch.equal(refining.train().estimate(bright_towards(up)), once)


def test_an_image_of_one_colour_has_no_up_and_stays_as_it_is():
    model = network(refine_steps=1)
    colours = torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [0.9, 0.1, 0.3]])[:, :, None, None].expand(-1, -1, 16, 32)
    steps_of_8_bits = colours + torch.randint(-1, 1, (3, 1, 16, 32), generator=torch.Generator().manual_seed(0)) / 255
    for image in (colours, steps_of_8_bits.clamp(0, 1)):
        assert (model.orientation(image).norm(dim=-1) > 0).all(), "the orientation network alone has an opinion"
        assert (model.estimate(image) == 0).all()
    up, level = model(colours)
    assert up.tolist() == [[0, 0, 1]] * 3
    torch.testing.assert_close(level, model.level(colours, torch.tensor([[0.0, 0.0, 1.0]] * 3)).gated)
    textured = colours[:1] + 0.1 * torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    assert (model.estimate(torch.cat([colours, textured])) != 0).any(dim=-1).tolist() == [False] * 3 + [True]


def test_only_the_zero_vector_stands_for_level():
    vectors = torch.tensor([[0.0, 0.0, 0.0], [3e-20, 0.0, 0.0], [0.0, 3.0, 4.0]])
    torch.testing.assert_close(unit_up(vectors), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.6, 0.8]]))


def test_the_level_image_is_the_rotated_one_and_the_gate_chooses_image_by_image():
    model = network()
    image, up = torch.rand(3, 3, 16, 32), up_vectors(range(3))
    found = model.level(image, up)
    torch.testing.assert_close(found.plain, rotate_equirectangular(image, rotation_from_up(up), "bicubic").clamp(0, 1))
    assert found.refined.min() >= 0
    assert found.refined.max() <= 1
    for index, taken in enumerate(found.took_refined):
        assert torch.equal(found.gated[index], (found.refined if taken else found.plain)[index])
    plain = network(reconstruct=False).level(image, up)
    assert torch.equal(plain.gated, found.plain)
    assert not plain.took_refined.any()


def test_other_sizes_than_the_learned_tables_go_through_the_exact_one():
    learned, exact = network(learned=True), network()
    up = up_vectors(range(2))
    for height in (16, 32, 10):
        image = torch.rand(2, 3, height, 2 * height)
        tables = learned.table_for(image, up), exact.table_for(image, up)
        assert torch.equal(*tables) is (height != 16)
        torch.testing.assert_close(*tables, rtol=0, atol=0.02)


def test_larger_images_are_averaged_for_the_orientation():
    model = network()
    image = torch.rand(2, 3, 48, 96)
    averaged = image.unflatten(3, (32, 3)).unflatten(2, (16, 3)).mean(dim=(3, 5))
    torch.testing.assert_close(model.estimate(image), model.estimate(averaged))


@pytest.mark.parametrize("shape", [(1, 3, 24, 48), (1, 3, 16, 16), (1, 3, 8, 16), (3, 16, 32)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"image must have shape \(B, 3, k 16, k 32\), got"):
        network().estimate(torch.rand(shape))


@pytest.mark.parametrize(
    ("height", "options"),
    [(16, {}), (48, {}), (16, {"learned": True, "refine_steps": 1}), (16, {"reconstruct": False})],
    ids=["plain", "larger images", "learned table, looks again", "no refiner"],
)
def test_exports_whole_for_every_batch(height, options):
    model = network(**options)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 3, height, 2 * height),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    image = torch.rand(5, 3, height, 2 * height)
    image[1] = 0.5
    with torch.no_grad():
        for one, other in zip(loaded(image), model(image), strict=True):
            assert (one - other).abs().max() < 1e-4
    assert math.isclose(float(loaded(image[:1])[0].detach().norm()), 1, abs_tol=1e-5)
