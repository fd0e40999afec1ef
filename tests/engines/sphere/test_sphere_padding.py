"""Oracle: each padded pixel is walked to over the sphere, and its value looked up by direction."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sphere import pad_equirectangular
from lightning_plugins.engines.sphere.padding import pad_sides
from tests.engines.sphere.fields import grid_directions


def direction_of(v, u, height, width):
    """Return the direction of a pixel that may lie beyond the image: colatitudes below 0 walk over the pole."""
    colatitude, longitude = np.pi * (v + 0.5) / height, 2 * np.pi * ((u + 0.5) / width - 0.5)
    return np.array([np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude), np.cos(colatitude)])


def padded_by_geometry(image, rows, columns):
    height, width = image.shape
    directions = grid_directions(height, width).reshape(-1, 3)
    result = np.empty((height + 2 * rows, width + 2 * columns))
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            pixel = np.argmax(directions @ direction_of(i - rows, j - columns, height, width))
            result[i, j] = image.reshape(-1)[pixel]
    return result


@pytest.mark.parametrize("padding", [(1, 1), (2, 3), (0, 2), (3, 0), (6, 12), (1, 9), (0, 0)])
def test_every_padded_pixel_shows_its_direction(padding):
    image = torch.randn(6, 12, dtype=torch.float64)
    padded = pad_equirectangular(image[None, None], padding)
    np.testing.assert_array_equal(padded[0, 0], padded_by_geometry(image.numpy(), *padding))


def test_one_number_pads_rows_and_columns_and_sides_may_differ():
    image = torch.randn(2, 3, 4, 8)
    padded = pad_equirectangular(image, 2)
    torch.testing.assert_close(padded, pad_equirectangular(image, (2, 2)), rtol=0, atol=0)
    torch.testing.assert_close(pad_sides(image, (0, 1), (2, 0)), padded[..., 2:-1, :-2], rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_is_the_adjoint(memory_format):
    image = torch.randn(2, 3, 4, 6, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pad_sides(x, (2, 1), (3, 6)), image)
    assert torch.autograd.gradgradcheck(lambda x: pad_sides(x, (1, 2), (0, 1)).square(), image)


def test_gradient_counts_how_often_a_pixel_is_shown():
    image = torch.arange(4 * 6, dtype=torch.float64).view(1, 1, 4, 6).requires_grad_()
    padded = pad_equirectangular(image, (2, 4))
    padded.sum().backward()
    shown = np.bincount(padded.detach().long().flatten().numpy(), minlength=24)
    np.testing.assert_array_equal(image.grad.flatten(), shown)


def test_works_under_vmap_and_functional_gradients():
    images = torch.randn(5, 1, 2, 4, 8, dtype=torch.float64)
    one_by_one = torch.stack([pad_equirectangular(image, 1) for image in images])
    torch.testing.assert_close(torch.vmap(lambda x: pad_equirectangular(x, 1))(images), one_by_one)
    gradients = torch.vmap(torch.func.grad(lambda x: pad_equirectangular(x, 1).square().sum()))(images)
    expected = images.clone().requires_grad_()
    pad_equirectangular(expected.flatten(0, 1), 1).square().sum().backward()
    torch.testing.assert_close(gradients, expected.grad)


def test_an_odd_width_can_wrap_but_not_mirror():
    assert pad_equirectangular(torch.zeros(1, 1, 4, 7), (0, 1)).shape == (1, 1, 4, 9)
    with pytest.raises(ValueError, match="must be even, got 7"):
        pad_equirectangular(torch.zeros(1, 1, 4, 7), (1, 1))


@pytest.mark.parametrize("padding", [(5, 1), (1, 9), (-1, 1)])
def test_padding_beyond_the_image_is_refused(padding):
    with pytest.raises(ValueError, match="between 0 and the image's 4 x 8 pixels"):
        pad_equirectangular(torch.zeros(1, 1, 4, 8), padding)
