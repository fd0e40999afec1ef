"""Oracles: the carried kernel read point by point in numpy, with rotations written as matrices and triangles from scipy's
convex hull; the exact gains of a filter of rings on harmonics (Funk and Hecke); brute-force means over circles."""

import copy
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from lightning_plugins.engines.sphere import (
    EquirectangularGrid,
    SpherePoints,
    SphericalConv2d,
    fibonacci_sphere,
    icosphere,
    pad_equirectangular,
)
from tests.engines.sphere.fields import BandLimited, grid_directions, random_rotation, read_bilinear, ring_gains

RINGS = ((6, 1.0), (5, 2.3))


def carried_points(node, rings, spacing):
    """Return the kernel's points at a node, Rz(azimuth) Ry(colatitude) applied to them one by one."""
    colatitude = np.arctan2(np.hypot(node[0], node[1]), node[2])
    azimuth = np.arctan2(node[1], node[0]) if np.hypot(node[0], node[1]) > 1e-9 else 0.0
    cz, sz, cy, sy = np.cos(azimuth), np.sin(azimuth), np.cos(colatitude), np.sin(colatitude)
    turn = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    points = [turn @ [0, 0, 1]]
    for count, radius in rings:
        for m in range(count):
            a, r = 2 * np.pi * m / count, radius * spacing
            points.append(turn @ [np.sin(r) * np.cos(a), np.sin(r) * np.sin(a), np.cos(r)])
    return points


def read_triangle(values, direction, points, hull):
    """Interpolate one value in the facet of the hull that the direction's ray meets."""
    for corners in hull.simplices:
        amounts = np.linalg.solve(points[corners].T, direction)
        if (amounts >= -1e-9).all():
            return values[corners] @ amounts / amounts.sum()
    raise AssertionError("no triangle holds the direction")


def reference(conv, image):
    """Return the convolution of image (C, nodes) in O(nodes x points), shape (out, nodes)."""
    domain = conv.domain
    nodes = domain.directions().numpy()
    if isinstance(domain, EquirectangularGrid):
        read, source = read_bilinear, ()
        image = image.reshape(-1, *domain.shape)
    else:
        read, source = read_triangle, (nodes, ConvexHull(nodes))
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    result = np.empty((conv.out_channels, len(nodes)))
    ring_of = np.repeat(np.arange(len(conv.rings) + 1), [1, *(count for count, _ in conv.rings)])
    for n, node in enumerate(nodes):
        places = carried_points(node, conv.rings, domain.spacing_rad)
        samples = np.array([[read(channel, place, *source) for place in places] for channel in image])
        if conv.isotropic:
            samples = np.stack([samples[:, ring_of == ring].mean(axis=1) for ring in range(len(conv.rings) + 1)], axis=1)
        result[:, n] = np.einsum("oct,ct->o", weight, samples) + bias
    return result


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize(
    "domain",
    [EquirectangularGrid(9, 18), EquirectangularGrid(4, 6), SpherePoints(fibonacci_sphere(50)), SpherePoints(icosphere(1))],
    ids=["grid", "small grid", "fibonacci", "icosphere"],
)
def test_equals_the_reference_point_by_point(domain, isotropic):
    torch.manual_seed(0)
    conv = SphericalConv2d(2, 3, domain, RINGS if domain.node_count > 24 else ((6, 1.0),), isotropic)
    image = torch.randn(2, 2, *domain.shape)
    output = conv(image).detach()
    assert output.shape == (2, 3, *domain.shape)
    for b in range(2):
        expected = reference(conv, image[b].flatten(1).double().numpy())
        np.testing.assert_allclose(output[b].flatten(1), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        exact = conv(image[b : b + 1].double()).detach()[0]
        np.testing.assert_allclose(exact.flatten(1), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("width", [64, 50])
def test_any_roll_of_the_input_rolls_the_output(isotropic, width):
    conv = SphericalConv2d(4, 5, EquirectangularGrid(24, width), RINGS, isotropic)
    image = torch.randn(1, 4, 24, width)
    with torch.no_grad():
        output = conv(image)
        for shift in range(1, width):
            error = (conv(image.roll(shift, -1)) - output.roll(shift, -1)).abs().max() / output.abs().max()
            assert error < 1e-5


def test_the_table_of_a_grid_is_one_pattern_a_row():
    conv = SphericalConv2d(1, 1, EquirectangularGrid(8, 12), RINGS)
    matrix = conv.interpolation(torch.eye(96)).view(8, 12, 12, 8, 12)
    for column in range(12):
        assert torch.equal(matrix[:, column].roll(-column, -1), matrix[:, 0])


@lru_cache
def one_ring(sampling, count, angle_rad):
    """Return an isotropic convolution with one ring of fixed angle."""
    domain = SpherePoints(sampling(count))
    return SphericalConv2d(1, 1, domain, ((8, angle_rad / domain.spacing_rad),), isotropic=True, bias=False)


def tilt_error(sampling, count, seed, weights, angle_rad=0.25):
    """Return the relative error of a filter of one ring on a tilted band-limited field."""
    conv = one_ring(sampling, count, angle_rad)
    with torch.no_grad():
        conv.weight[0, 0] = torch.tensor(weights)
    field = BandLimited(8, seed)
    tilted = conv.domain.directions().numpy() @ random_rotation(seed)
    output = conv(torch.tensor(field(tilted), dtype=torch.float32)[None, None]).detach()[0, 0].numpy()
    expected = field.filtered(tilted, ring_gains(8, weights, [0, angle_rad]))
    return np.linalg.norm(output - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -1.0)], ids=["smoothing", "edges"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_isotropic_filters_do_not_see_the_tilt(seed, weights):
    ico = [tilt_error(icosphere, level, seed, weights) for level in (1, 2, 3, 4)]
    lattice = [tilt_error(fibonacci_sphere, count, seed, weights) for count in (162, 642, 2562)]
    for errors in (ico, lattice):
        assert all(fine < coarse for coarse, fine in pairwise(errors))
        assert errors[-1] < 0.02


def test_anisotropic_kernels_see_the_tilt():
    domain = SpherePoints(icosphere(3))
    conv = SphericalConv2d(1, 1, domain, bias=False)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 1] = 1.0
    field, tilt = BandLimited(4, seed=0), random_rotation(0)
    nodes = domain.directions().numpy()
    south = np.array([carried_points(node, conv.rings, conv.spacing_rad)[1] for node in nodes])
    output = conv(torch.tensor(field(nodes @ tilt), dtype=torch.float32)[None, None]).detach()[0, 0].numpy()
    assert np.abs(output - field(south @ tilt)).max() < 0.02
    off_poles = np.abs(nodes[:, 2]) < 0.95
    assert np.all(south[off_poles, 2] < nodes[off_poles, 2])


def circle_means(field, nodes, angle_rad, count=360):
    """Return the mean of a field over the circle about each node, by brute force."""
    helper = np.where(np.abs(nodes[..., 2:]) < 0.9, [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])
    a = np.cross(helper, nodes)
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = np.cross(nodes, a)
    turns = 2 * np.pi * np.arange(count) / count
    around = (field(np.cos(angle_rad) * nodes + np.sin(angle_rad) * (np.cos(t) * a + np.sin(t) * b)) for t in turns)
    return sum(around) / count


def test_the_error_is_flat_in_latitude_where_a_planar_kernel_fails_at_the_poles():
    height, width, reach = 64, 128, 3
    domain = EquirectangularGrid(height, width)
    conv = SphericalConv2d(1, 1, domain, ((4, reach),), isotropic=True, bias=False)
    with torch.no_grad():
        conv.weight[0, 0] = torch.tensor([1.0, -1.0])
    nodes = grid_directions(height, width)
    latitude_deg = np.abs(np.degrees(np.arcsin(nodes[:, 0, 2])))
    cross = torch.tensor([[0, -0.25, 0], [-0.25, 1, -0.25], [0, -0.25, 0]])[None, None]
    bands = {"sphere": np.zeros(6), "plane": np.zeros(6)}
    for seed in range(3):
        field = BandLimited(6, seed)
        expected = field(nodes) - circle_means(field, nodes, reach * conv.spacing_rad)
        image = torch.tensor(field(nodes), dtype=torch.float32)[None, None]
        outputs = {
            "sphere": conv(image).detach(),
            "plane": torch.nn.functional.conv2d(pad_equirectangular(image, reach), cross, dilation=reach),
        }
        for name, output in outputs.items():
            error = (output[0, 0].numpy() - expected) / np.sqrt((expected**2).mean())
            for band in range(6):
                rows = (latitude_deg >= 15 * band) & (latitude_deg < 15 * band + 15)
                bands[name][band] += np.sqrt((error[rows] ** 2).mean()) / 3
    assert bands["sphere"].max() < 2 * np.median(bands["sphere"])
    assert bands["plane"][5] > 5 * bands["sphere"][5]
    assert bands["plane"][0] < 5 * bands["sphere"].max()


def test_poles_have_an_explicit_frame():
    conv = SphericalConv2d(1, 1, SpherePoints(icosphere(4)), ((4, 1.0),), bias=False)
    domain = SpherePoints(icosphere(4))
    north, south = (int(i) for i in (domain.directions()[:, 2].argmax(), domain.directions()[:, 2].argmin()))
    x = domain.directions().float().T[None, :1]
    seen = []
    for term in (1, 2, 3, 4):
        with torch.no_grad():
            conv.weight.zero_()[0, 0, term] = 1.0
            seen.append(conv(x)[0, 0, [north, south]])
    step = np.sin(conv.spacing_rad)
    # At the north pole the kernel's azimuth 0 is forward; at the south pole, carried there along the forward meridian, backward.
    np.testing.assert_allclose(torch.stack(seen), [[step, -step], [0, 0], [-step, step], [0, 0]], atol=2e-4)


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("domain", [EquirectangularGrid(2, 6), SpherePoints(fibonacci_sphere(16))], ids=["grid", "points"])
def test_gradients_of_values_weight_and_bias(domain, isotropic):
    conv = SphericalConv2d(2, 1, domain, ((4, 1.0),), isotropic).double()
    values = torch.randn(2, 2, *domain.shape, dtype=torch.float64, requires_grad=True)

    def function(values, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (values,))

    inputs = (values, conv.weight.detach().requires_grad_(), conv.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(lambda *all: function(*all).pow(2), inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample_agree_with_one_by_one():
    conv = SphericalConv2d(2, 3, SpherePoints(fibonacci_sphere(20)))
    values, weights = torch.randn(4, 2, 20), dict(conv.named_parameters())

    def loss(weights, sample):
        return torch.func.functional_call(conv, weights, (sample[None],)).square().sum()

    together = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, values)
    for i in range(4):
        alone = torch.autograd.grad(loss(weights, values[i]), list(weights.values()))
        torch.testing.assert_close([together[name][i] for name in weights], list(alone), rtol=1e-4, atol=1e-4)


def test_another_domain_shares_the_weights_and_answers_alike():
    fine, coarse = EquirectangularGrid(64, 128), EquirectangularGrid(32, 64)
    conv = SphericalConv2d(1, 2, coarse, ((8, 1.0),))
    state = torch.get_rng_state()
    other = conv.with_domain(fine)
    assert torch.equal(torch.get_rng_state(), state)
    assert other.weight is conv.weight
    assert other.bias is conv.bias
    assert (conv.domain, other.domain) == (coarse, fine)
    assert other(torch.zeros(1, 1, 64, 128)).shape == (1, 2, 64, 128)
    assert conv(torch.zeros(1, 1, 32, 64)).shape == (1, 2, 32, 64)
    back = other.with_domain(coarse)
    image = torch.randn(1, 1, 32, 64)
    torch.testing.assert_close(back(image), conv(image), rtol=0, atol=0)
    assert other.double().with_domain(coarse).interpolation.dtype == torch.float64


def test_only_weight_and_bias_are_saved_and_fit_every_domain():
    small = SphericalConv2d(2, 3, SpherePoints(icosphere(1)), RINGS)
    large = SphericalConv2d(2, 3, EquirectangularGrid(16, 32), RINGS)
    assert list(small.state_dict()) == ["weight", "bias"]
    assert small.weight.shape == (3, 2, 12)
    assert SphericalConv2d(2, 3, small.domain, RINGS, isotropic=True, bias=False).weight.shape == (3, 2, 3)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.weight, small.weight)
    image = torch.randn(1, 2, 16, 32)
    torch.testing.assert_close(copy.deepcopy(large)(image), large(image))


def test_spacing_is_that_of_the_domain():
    assert SphericalConv2d(1, 1, EquirectangularGrid(16, 32)).spacing_rad == pytest.approx(np.pi / 16)
    assert SphericalConv2d(1, 1, SpherePoints(icosphere(2))).spacing_rad == pytest.approx(np.sqrt(4 * np.pi / 162))


def test_learns_a_filter():
    torch.manual_seed(0)
    domain = SpherePoints(fibonacci_sphere(100))
    teacher, student = (SphericalConv2d(2, 2, domain) for _ in range(2))
    optimizer = torch.optim.LBFGS(student.parameters(), line_search_fn="strong_wolfe", max_iter=100)
    values = torch.randn(4, 2, 100)
    target = teacher(values).detach()

    def closure():
        optimizer.zero_grad()
        loss = (student(values) - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(student.weight, teacher.weight, rtol=0, atol=1e-2)


def test_bad_input_is_refused():
    grid = EquirectangularGrid(4, 8)
    with pytest.raises(ValueError, match=r"reads \(B, 2, 4, 8\), got \(1, 2, 8, 16\); with_domain"):
        SphericalConv2d(2, 1, grid)(torch.zeros(1, 2, 8, 16))
    with pytest.raises(ValueError, match=r"reads \(B, 2, 4, 8\), got \(1, 3, 4, 8\)"):
        SphericalConv2d(2, 1, grid)(torch.zeros(1, 3, 4, 8))
    with pytest.raises(ValueError, match=r"got 8 points at 5\.0 node spacings, here 225\.0 degrees"):
        SphericalConv2d(1, 1, grid, ((8, 5.0),))
    with pytest.raises(ValueError, match="1 point or more"):
        SphericalConv2d(1, 1, grid, ((0, 1.0),))
    with pytest.raises(ValueError, match="even number of columns"):
        EquirectangularGrid(4, 7)
