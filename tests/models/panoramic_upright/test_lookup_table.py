"""Oracle: Rodrigues' formula from the tilt's axis and angle, in float64 numpy."""

import io
from math import radians

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import sample_equirectangular
from lightning_plugins.models.panoramic_upright.lookup_table import AnalyticLookupTable, LearnedLookupTable, fit_lookup_table

TILTS_DEG = [0, 0.01, 5, 30, 60, 89.9, 90, 90.1, 120, 150, 175, 179.99, 180]
# Around 180 degrees the horizon's lowest point crosses the seam.
AZIMUTHS_DEG = [-180, -179.9, -135, -90, -45, 0, 45, 90, 135, 179.9]
TILTED_DEG = [(tilt, azimuth) for tilt in TILTS_DEG for azimuth in AZIMUTHS_DEG]


def up_vector(tilt_deg, azimuth_deg):
    tilt, azimuth = radians(tilt_deg), radians(azimuth_deg)
    return np.array([np.sin(tilt) * np.cos(azimuth), np.sin(tilt) * np.sin(azimuth), np.cos(tilt)])


def oracle(tilt_deg, azimuth_deg, height, width):
    """Level directions d, turned by the tilt about the horizontal axis to the left of where it leans: d cos + k x d sin + ..."""
    longitude = (np.arange(width) + 0.5) / width * 2 * np.pi - np.pi
    latitude = np.pi / 2 - (np.arange(height)[:, None] + 0.5) / height * np.pi
    level = np.stack(
        np.broadcast_arrays(np.cos(latitude) * np.cos(longitude), -np.cos(latitude) * np.sin(longitude), np.sin(latitude)), -1
    )
    tilt, azimuth = radians(tilt_deg), radians(azimuth_deg)
    axis = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    along = (level @ axis)[..., None] * axis
    return level * np.cos(tilt) + np.cross(axis, level) * np.sin(tilt) + along * (1 - np.cos(tilt))


def errors_deg(table, tilted, height, width):
    """Angles between table and oracle, ``(len(tilted), height, width)``, from chords: arccos is blind to small ones."""
    result = []
    with torch.no_grad():
        for tilt, azimuth in tilted:
            read = table(torch.tensor(up_vector(tilt, azimuth)[None], dtype=torch.float32))[0].double().numpy()
            chord = np.linalg.norm(read - oracle(tilt, azimuth, height, width), axis=-1)
            result.append(np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1))))
    return np.stack(result)


def exported(module, *inputs):
    """The module after torch.export, written and read again, for batches of any length."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_the_analytic_table_is_exact_at_every_tilt():
    assert errors_deg(AnalyticLookupTable(64, 128), TILTED_DEG, 64, 128).max() < 1e-4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (32, 20)])
def test_the_analytic_table_has_any_size(height, width):
    assert errors_deg(AnalyticLookupTable(height, width), TILTED_DEG, height, width).max() < 1e-4


def test_an_upside_down_camera_is_turned_about_its_forward_axis():
    expected = oracle(0, 0, 64, 128) * [1, -1, -1]
    torch.manual_seed(0)
    learned = LearnedLookupTable(64, 128, blocks=1)
    fit_lookup_table(learned)
    for table, tolerance in ((AnalyticLookupTable(64, 128), 1e-6), (learned, 1e-3)):
        np.testing.assert_allclose(table(torch.tensor([[0.0, 0.0, -1.0]]))[0].detach().numpy(), expected, atol=tolerance)


def test_the_length_of_the_up_vector_does_not_matter():
    table = AnalyticLookupTable(8, 16)
    up = torch.tensor([[0.3, -0.5, 0.8]])
    torch.testing.assert_close(table(5 * up), table(up))


@pytest.mark.parametrize("tilt_deg", [0, 40, 90, 140, 175])
def test_the_gradient_in_the_up_vector(tilt_deg):
    table = AnalyticLookupTable(3, 4).double()
    ups = np.stack([up_vector(tilt_deg, azimuth) for azimuth in (20, 180)])
    assert torch.autograd.gradcheck(table, torch.tensor(ups, requires_grad=True))


def test_the_analytic_table_is_exact_in_mixed_precision():
    table = AnalyticLookupTable(16, 32)
    up = torch.tensor([[0.3, -0.5, 0.8]])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = table(up)
    assert torch.equal(mixed, table(up))


@pytest.mark.parametrize("module", [AnalyticLookupTable(16, 32), LearnedLookupTable(16, 32)], ids=["analytic", "learned"])
def test_exports_for_every_batch(module):
    program = exported(module, torch.randn(2, 3))
    up = torch.randn(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(program(up), module(up), rtol=0, atol=1e-6)


class Levelled(torch.nn.Module):
    """Reads an image through its table."""

    def __init__(self):
        super().__init__()
        self.table = AnalyticLookupTable(16, 32)

    def forward(self, image, up):
        return sample_equirectangular(image, self.table(up))


def test_exports_with_the_reading_of_the_image():
    module = Levelled().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.rand(2, 3, 16, 32), torch.randn(2, 3)), dynamic_shapes=({0: batch}, {0: batch}))
    image, up = torch.rand(5, 3, 16, 32), torch.randn(5, 3)
    torch.testing.assert_close(program.module()(image, up), module(image, up), rtol=0, atol=1e-6)


def test_checkpoints_hold_weights_alone():
    assert not AnalyticLookupTable(16, 32).state_dict()
    module = LearnedLookupTable(16, 32)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_the_learned_table_holds_unit_vectors_and_every_weight_learns():
    torch.manual_seed(0)
    module = LearnedLookupTable(32, 64, blocks=2)
    table = module(torch.randn(3, 3))
    assert table.shape == (3, 32, 64, 3)
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(3, 32, 64))
    table[..., 0].square().mean().backward()
    assert [name for name, p in module.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_the_fitted_table_reaches_the_goal():
    torch.manual_seed(0)
    module = LearnedLookupTable(256, 512)
    fit_lookup_table(module)
    errors = errors_deg(module, TILTED_DEG[::3], 256, 512)
    # The goal is 0.1 and 0.5 degrees.
    assert errors.mean() < 0.005
    assert np.percentile(errors, 99) < 0.01
    assert errors.max() < 0.02


def test_the_fit_changes_both_parts_for_the_better():
    torch.manual_seed(0)
    module = LearnedLookupTable(64, 128, blocks=2)
    untrained = errors_deg(module, TILTED_DEG, 64, 128).mean()
    fit_lookup_table(module)
    fitted = errors_deg(module, TILTED_DEG, 64, 128).mean()
    for block in module.blocks:
        torch.nn.init.zeros_(block.refine.weight)
    interpolated = errors_deg(module, TILTED_DEG, 64, 128).mean()
    assert 4 * fitted < interpolated < 0.01 * untrained, f"{untrained:.2f}, {interpolated:.4f}, {fitted:.4f} degrees"


def test_the_fitted_weights_stay_small_and_follow_the_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        module = LearnedLookupTable(32, 64, blocks=2)
        fit_lookup_table(module, seed)
        assert max(float(p.detach().abs().max()) for p in module.parameters()) < 3
        weights.append(module.converter.weight)
    # Solvers round as the memory's alignment has it.
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
    assert (weights[0] - weights[2]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3)])
@pytest.mark.parametrize("module", [AnalyticLookupTable(16, 32), LearnedLookupTable(16, 32)], ids=["analytic", "learned"])
def test_other_up_vectors_are_refused(module, shape):
    with pytest.raises(ValueError, match=r"up must have shape \(B, 3\), got"):
        module(torch.ones(shape))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AnalyticLookupTable(0, 32), "1 row and 1 column or more, got 0 x 32"),
        (lambda: LearnedLookupTable(-8, 32), "1 row and 1 column or more, got -8 x 32"),
        (lambda: LearnedLookupTable(20, 32), "rows in multiples of 8 and columns in multiples of 16, got 20 x 32"),
        (lambda: LearnedLookupTable(16, 24), "rows in multiples of 8 and columns in multiples of 16, got 16 x 24"),
        (lambda: LearnedLookupTable(16, 32, blocks=0), "blocks and hidden must be 1 or more, got 0 and 64"),
        (lambda: LearnedLookupTable(16, 32, hidden=0), "blocks and hidden must be 1 or more, got 3 and 0"),
    ],
)
def test_bad_options_are_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
