"""Oracle: the discrete-continuous convolution of torch-harmonics (where it is installed), an integral over a radial filter,
against the same filter made of rings."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import EquirectangularGrid, SphericalConv2d, sample_equirectangular
from tests.engines.sphere.fields import BandLimited, grid_directions

# Its wheels are built for one torch each: with another they cannot be imported, which skips as well.
torch_harmonics = pytest.importorskip("torch_harmonics", exc_type=ImportError)

HEIGHT, WIDTH, REACH_RAD = 64, 128, 0.4


def pole_to_pole_directions():
    """Return the directions of the grid that torch-harmonics calls equiangular: HEIGHT + 1 rows, the poles among them."""
    colatitude, azimuth = np.meshgrid(np.pi * np.arange(HEIGHT + 1) / HEIGHT, 2 * np.pi * np.arange(WIDTH) / WIDTH, indexing="ij")
    return np.stack((np.sin(colatitude) * np.cos(azimuth), np.sin(colatitude) * np.sin(azimuth), np.cos(colatitude)), axis=-1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("profile", [(1.0, 0.5, 0.2), (1.0, -0.4, 0.1)], ids=["smoothing", "edges"])
def test_a_filter_of_many_rings_is_its_integral(profile):
    size = (HEIGHT + 1, WIDTH)
    disco = torch_harmonics.DiscreteContinuousConvS2(
        1, 1, size, size, (5, 1), basis_norm_mode="individual", bias=False, theta_cutoff=REACH_RAD, optimized_kernel=False
    )
    # Its basis is three hats, a third of the reach apart, each scaled to integrate to 1; ours is a ring in each of 24 strips.
    step = REACH_RAD / 24
    radii = (np.arange(24) + 0.5) * step
    strips = 2 * np.pi * np.sin(radii) * step
    hats = np.stack([np.interp(radii, np.arange(4) * REACH_RAD / 3, hat) for hat in np.eye(4)[:3]])
    field = BandLimited(8, seed=0)
    with torch.no_grad():
        disco.weight.copy_(torch.tensor(profile * (hats @ strips)).view_as(disco.weight))
        expected = disco(torch.tensor(field(pole_to_pole_directions()), dtype=torch.float32)[None, None])[0, 0]
    domain = EquirectangularGrid(HEIGHT, WIDTH)
    conv = SphericalConv2d(1, 1, domain, [(12, r / domain.spacing_rad) for r in radii], isotropic=True, bias=False)
    with torch.no_grad():
        conv.weight[0, 0, 0] = 0.0
        conv.weight[0, 0, 1:] = torch.tensor(profile @ hats * strips)
        ours = conv(torch.tensor(field(grid_directions(HEIGHT, WIDTH)), dtype=torch.float32)[None, None])
    ours = sample_equirectangular(ours, torch.tensor(pole_to_pole_directions()), "bicubic")[0, 0]
    error = (ours - expected).norm() / expected.norm()
    assert error < 1e-2, f"relative difference {error:.4f}"
