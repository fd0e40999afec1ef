"""Resizing: each pixel against the triangle filter walked over the sphere, seamless, a shift-free map of smooth functions."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.engines.sphere import resize_equirectangular


def triangle(size, target, index, turn=0.0):
    """Return the sources, on and beyond the image, that a target pixel reads, and their weights: one tent, summed up by hand."""
    step = size / target
    centre = (index + 0.5) * step - 0.5 + turn
    reach = max(step, 1.0)
    around = range(int(np.floor(centre - reach)), int(np.ceil(centre + reach)) + 1)
    weights = [max(0.0, 1 - abs(i - centre) / reach) for i in around]
    return [(i, w / sum(weights)) for i, w in zip(around, weights, strict=True) if w > 0]


def by_hand(image, height, width):
    rows, columns = image.shape
    result = np.zeros((height, width))
    for v in range(height):
        for u in range(width):
            for i, down in triangle(rows, height, v):
                over, row = (True, -1 - i) if i < 0 else (True, 2 * rows - 1 - i) if i >= rows else (False, i)
                for j, across in triangle(columns, width, u, columns / 2 if over else 0.0):
                    result[v, u] += down * across * image[row, j % columns]
    return result


def smooth(height: int, width: int) -> torch.Tensor:
    """x, y, z and a product of them at the pixels, straight from the angles: the oracle has no directions of ours."""
    colatitude = np.pi * (np.arange(height) + 0.5)[:, None] / height
    longitude = 2 * np.pi * ((np.arange(width) + 0.5)[None] / width - 0.5)
    x, y = np.sin(colatitude) * np.cos(longitude), np.sin(colatitude) * np.sin(longitude)
    z = np.cos(colatitude) + 0 * longitude
    return torch.from_numpy(np.stack([x, y, z, x * y + 0.5 * z * z]))[None]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((8, 16), (4, 8)),
        ((4, 8), (6, 12)),
        ((9, 14), (4, 6)),
        ((7, 9), (3, 5)),
        ((3, 5), (8, 11)),
        ((5, 8), (5, 6)),
        ((4, 6), (1, 2)),
    ],
)
def test_equals_the_filter_by_hand(source, target):
    image = torch.randn(2, 3, *source, dtype=torch.float64)
    resized = resize_equirectangular(image, *target)
    for b, c in ((0, 0), (1, 2)):
        np.testing.assert_allclose(resized[b, c], by_hand(image[b, c].numpy(), *target), atol=1e-12)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((64, 128), (32, 64)),
        ((32, 64), (64, 128)),
        ((48, 96), (32, 64)),
        ((100, 200), (64, 128)),
        ((64, 128), (64, 128)),
        ((1000, 2001), (64, 128)),
        ((64, 128), (1000, 2001)),
        ((51, 101), (33, 67)),
    ],
)
def test_maps_smooth_functions_onto_themselves(source, target):
    resized = resize_equirectangular(smooth(*source), *target)
    # Linear interpolation errs by curvature x spacing^2 / 8; rows of the poles, where two longitudes meet, by no more.
    tolerance = 2.5 * (np.pi / min(source[0], target[0])) ** 2 / 8 + 1e-12
    assert (resized - smooth(*target)).abs().max() < 4 * tolerance


@pytest.mark.parametrize(("source", "target"), [((64, 128), (32, 64)), ((32, 64), (64, 128)), ((45, 96), (7, 32))])
def test_knows_no_seam(source, target):
    image = torch.rand(1, 3, *source, dtype=torch.float64)
    step_in, step_out = source[1] // 32, target[1] // 32
    rolled = resize_equirectangular(image.roll(11 * step_in, -1), *target)
    torch.testing.assert_close(rolled, resize_equirectangular(image, *target).roll(11 * step_out, -1))


def test_keeps_constants_and_its_own_size():
    torch.testing.assert_close(resize_equirectangular(torch.full((1, 1, 30, 60), 3.0), 64, 128), torch.full((1, 1, 64, 128), 3.0))
    image = torch.rand(1, 2, 7, 13)
    same = resize_equirectangular(image, 7, 13)
    assert torch.equal(same, image)
    assert same.data_ptr() != image.data_ptr()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(("source", "target"), [((1001, 2002), (64, 128)), ((64, 127), (251, 502))])
def test_sizes_without_a_common_divisor_need_no_more_memory(source, target):
    image = torch.rand(1, 3, *source)
    with Largest() as largest:
        result = resize_equirectangular(image, *target)
    assert 0 < largest.elements <= max(image.numel(), result.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_come_back_as_they_came(dtype):
    image = torch.rand(1, 2, 12, 24, dtype=torch.float64)
    resized = resize_equirectangular(image.to(dtype), 5, 10)
    assert resized.dtype == dtype
    assert (resized.double() - resize_equirectangular(image, 5, 10)).abs().max() < 4 * torch.finfo(dtype).eps


def test_gradient_is_the_adjoint():
    image = torch.randn(1, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_equirectangular(x, 3, 4), image)
    assert torch.autograd.gradcheck(lambda x: resize_equirectangular(x, 6, 9), image)


@pytest.mark.parametrize(
    ("shape", "size", "sentence"),
    [
        ((3, 8, 16), (4, 8), r"must have shape \(B, C, H, W\) without a 0, got \(3, 8, 16\)"),
        ((1, 3, 0, 16), (4, 8), r"without a 0, got \(1, 3, 0, 16\)"),
        ((1, 3, 8, 16), (0, 8), "height and width must be 1 or more, got 0 and 8"),
    ],
)
def test_impossible_sizes_are_refused(shape, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        resize_equirectangular(torch.zeros(shape), *size)


def test_integers_are_refused():
    with pytest.raises(ValueError, match=r"needs floating point values, got torch.uint8; convert them with .float\(\)"):
        resize_equirectangular(torch.zeros(1, 3, 8, 16, dtype=torch.uint8), 4, 8)
