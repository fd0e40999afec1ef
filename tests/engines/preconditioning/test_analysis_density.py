"""Oracles: traces of powers and eigenvalues of the dense matrix."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.preconditioning.analysis import CurvatureOperator, MatrixOperator, spectral_density


def symmetric(size=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.T / size - 0.3 * torch.eye(size, dtype=torch.float64)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def test_moments_are_the_traces_of_powers():
    matrix = symmetric()
    density = spectral_density(MatrixOperator(matrix), probes=400, steps=10, generator=seeded())
    for power in (1, 2, 3, 5):
        expected = float(torch.linalg.matrix_power(matrix, power).trace()) / len(matrix)
        found, error = density.moment(power)
        assert abs(found - expected) < 4 * error
        assert error < 0.05 * torch.linalg.eigvalsh(matrix).abs().max() ** power


def test_one_probes_quadrature_is_exact_up_to_twice_its_steps_less_one():
    matrix = symmetric()
    steps = 4
    density = spectral_density(MatrixOperator(matrix), probes=1, steps=steps, generator=seeded())
    sign = torch.randint(0, 2, (60, 1), generator=seeded()).mul(2).sub(1).double()[:, 0]
    for power in range(2 * steps):
        expected = float(sign @ torch.linalg.matrix_power(matrix, power) @ sign) / 60
        assert density.moment(power)[0] == pytest.approx(expected, rel=1e-10)
    beyond = float(sign @ torch.linalg.matrix_power(matrix, 2 * steps) @ sign) / 60
    assert abs(density.moment(2 * steps)[0] - beyond) > 1e-3 * beyond


def test_all_steps_find_all_eigenvalues():
    matrix = symmetric(20)
    density = spectral_density(MatrixOperator(matrix), probes=2, steps=20, generator=seeded())
    torch.testing.assert_close(density.nodes[0], torch.linalg.eigvalsh(matrix), rtol=0, atol=1e-9)


def test_density_has_mass_one_and_the_width_that_was_asked_for():
    density = spectral_density(MatrixOperator(3.0 * torch.eye(5, dtype=torch.float64)), probes=3, steps=4, generator=seeded())
    grid = torch.linspace(0, 6, 2001, dtype=torch.float64)
    expected = torch.exp(-0.5 * ((grid - 3.0) / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(density.density(grid, width=0.5), expected)
    whole = spectral_density(MatrixOperator(symmetric()), generator=seeded())
    grid = whole.grid(4000)
    assert float(torch.trapezoid(whole.density(grid), grid)) == pytest.approx(1.0, abs=1e-6)


def test_density_counts_eigenvalues_in_an_interval():
    values = torch.cat([torch.full((90,), 0.0), torch.full((10,), 5.0)]).double()
    basis, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64, generator=seeded()))
    operator = MatrixOperator((basis * values) @ basis.T)
    density = spectral_density(operator, probes=200, steps=30, generator=seeded())
    above = (density.weights * (density.nodes > 2.5)).sum(1)
    assert abs(float(above.mean()) - 0.1) < 4 * float(above.std()) / math.sqrt(200)
    assert float((density.weights > 0).sum(1).max()) == 2  # the Krylov space ends: no node is made of rounding errors


def test_of_a_networks_gauss_newton_matrix():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batches = [(torch.randn(30, 4, dtype=torch.float64), torch.randint(0, 3, (30,)))]
    operator = CurvatureOperator(module, functional.cross_entropy, batches)
    density = spectral_density(operator, probes=60, steps=6, generator=seeded())
    found, error = density.moment(1)
    assert abs(found - float(operator.dense().trace()) / operator.size) < 4 * error


def test_the_generator_alone_decides():
    operator = MatrixOperator(symmetric())
    one, two, other = (spectral_density(operator, probes=2, steps=5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.nodes, two.nodes)
    assert not torch.equal(one.nodes, other.nodes)


@pytest.mark.parametrize(
    ("options", "message"), [({"probes": 0}, "probes must be a whole number"), ({"steps": 0}, "steps must be")]
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        spectral_density(MatrixOperator(torch.eye(3)), **options)


def test_bad_width_and_what_is_not_finite_are_refused():
    density = spectral_density(MatrixOperator(torch.eye(3)), probes=1)
    assert math.isnan(density.moment(1)[1])
    with pytest.raises(InputError, match="width must be above 0"):
        density.density(density.grid(), width=0.0)
    with pytest.raises(InputError, match="NaN or infinity"):
        spectral_density(MatrixOperator(torch.full((3, 3), float("inf"))))
