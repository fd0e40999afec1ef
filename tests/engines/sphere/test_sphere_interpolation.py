"""Oracle: a dense float64 matrix, filled one entry at a time. Then what a module's tables must survive: dtypes, moves, copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins.engines.sphere import Resample, SpherePoints, SphericalConv2d, fibonacci_sphere
from lightning_plugins.engines.sphere.interpolation import Interpolation

TARGETS, SOURCES = 7, 5


@pytest.fixture
def table():
    """Rows, columns and weights in float64, with pairs that occur twice, zeros, and an empty row; and the matrix they make."""
    random = np.random.default_rng(0)
    row, column = random.integers(0, TARGETS - 1, (20, 2)), random.integers(0, SOURCES, (20, 2))
    weight = random.normal(size=(20, 2)) * (random.random((20, 2)) > 0.2)
    matrix = np.zeros((TARGETS, SOURCES))
    np.add.at(matrix, (row, column), weight)
    return *(torch.tensor(part) for part in (row, column, weight)), matrix


def made(table):
    return Interpolation(*table[:3], (TARGETS, SOURCES))


def exact(table, values):
    return torch.tensor(table[3] @ values.double().numpy())


@pytest.mark.parametrize(
    "prepare", [lambda m: m, lambda m: m.double(), lambda m: m.half(), lambda m: m.double().float().bfloat16()]
)
def test_double_precision_in_is_a_result_in_double_precision(table, prepare):
    values = torch.randn(SOURCES, 3, dtype=torch.float64, requires_grad=True)
    result = prepare(made(table))(values)
    torch.testing.assert_close(result, exact(table, values.detach()), rtol=0, atol=1e-14)
    result.sum().backward()
    expected = torch.tensor(table[3]).sum(dim=0)[:, None].expand(SOURCES, 3)
    torch.testing.assert_close(values.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: m.double(), lambda m: m.half()])
def test_the_values_dtype_is_returned_and_half_is_rounded_once(table, prepare, dtype):
    values = torch.randn(SOURCES, 3).to(dtype).requires_grad_()
    result = prepare(made(table))(values)
    assert result.dtype == dtype
    expected = exact(table, values.detach()).to(dtype)
    # The sum in float32 or better, rounded once: at most to the neighbour of the exact sum's rounding.
    torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    result.float().sum().backward()
    assert values.grad.dtype == dtype


def test_integers_are_refused(table):
    with pytest.raises(ValueError, match=r"floating point values, got torch.int64; convert them with .float\(\)"):
        made(table)(torch.ones(SOURCES, 1, dtype=torch.int64))


class Layers(nn.Module):
    """A convolution and a resampling, as a network holds them."""

    def __init__(self):
        super().__init__()
        points = fibonacci_sphere(20)
        self.convolution = SphericalConv2d(2, 3, SpherePoints(points))
        self.to_grid = Resample.points_to_grid(points, 4, 8)

    def forward(self, values):
        return self.to_grid(self.convolution(values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_convert_and_return_what_they_get(dtype):
    torch.manual_seed(0)
    layers, values = Layers(), torch.randn(2, 2, 20)
    expected = layers(values).detach()
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-5) * expected.abs().max()
    mixed = layers(values.to(dtype))
    converted = layers.to(dtype)(values.to(dtype))
    for result in (mixed, converted):
        assert result.dtype == dtype
        assert (result.float() - expected).abs().max() < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        assert layers.float()(values).shape == expected.shape


def test_tables_are_no_buffers_and_nothing_of_them_is_saved():
    layers = Layers()
    assert list(layers.buffers()) == []
    assert (
        [name for name, _ in layers.named_parameters()] == list(layers.state_dict()) == ["convolution.weight", "convolution.bias"]
    )


def test_tables_move_with_their_module():
    layers = Layers().to("meta")
    assert layers(torch.zeros(1, 2, 20, device="meta")).shape == (1, 3, 4, 8)
    back = layers.to_empty(device="cpu")
    fresh = Layers()
    back.load_state_dict(fresh.state_dict())
    values = torch.randn(1, 2, 20)
    torch.testing.assert_close(back(values), fresh(values), rtol=0, atol=0)


@pytest.mark.gpu
def test_tables_move_to_the_gpu_and_back():
    layers, values = Layers(), torch.randn(1, 2, 20, requires_grad=True)
    expected = layers(values)
    (gradient,) = torch.autograd.grad(expected.square().sum(), values)
    on_gpu = values.detach().cuda().requires_grad_()
    result = layers.cuda()(on_gpu)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(result.square().sum(), on_gpu)[0].cpu(), gradient, rtol=1e-4, atol=1e-4)
    assert layers.double()(on_gpu.double()).dtype == torch.float64
    torch.testing.assert_close(layers.float().cpu()(values), expected)


def test_copies_and_pickles_answer_alike():
    layers, values = Layers().double(), torch.randn(1, 2, 20, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(layers, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers)), torch.load(saved, weights_only=False)):
        assert torch.equal(other(values), layers(values))


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot export a Function applied by its backward")
def test_can_be_exported():
    layers, values = Layers().eval(), torch.randn(1, 2, 20)
    exported = torch.export.export(layers, (values,)).module()
    other = torch.randn(1, 2, 20)
    torch.testing.assert_close(exported(other), layers(other))
