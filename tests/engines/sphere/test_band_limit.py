"""Oracle: a dense matrix per row, built from cosines in float64, that shares no Fourier transform with the code."""

import numpy as np
import torch

from lightning_plugins.engines.sphere import limit_longitude_band


def dense_row_filter(row: int, height: int, width: int) -> np.ndarray:
    colatitude = np.pi * (row + 0.5) / height
    lag = np.arange(width)[:, None] - np.arange(width)[None]
    matrix = np.zeros((width, width))
    for order in range(width // 2 + 1):
        keep = np.clip(width / 2 * np.sin(colatitude) + 1 - order, 0, 1)
        multiplicity = 1 if order in (0, width // 2) else 2
        matrix += keep * multiplicity / width * np.cos(2 * np.pi * order * lag / width)
    return matrix


def test_equals_the_dense_filter_of_each_row():
    image = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    expected = np.stack([image[:, :, v].numpy() @ dense_row_filter(v, 8, 16).T for v in range(8)], axis=2)
    np.testing.assert_allclose(limit_longitude_band(image).numpy(), expected, atol=1e-12)


def test_keeps_row_means_and_equator_and_flattens_the_poles():
    image = torch.rand(1, 1, 64, 128, dtype=torch.float64)
    limited = limit_longitude_band(image)
    torch.testing.assert_close(limited.mean(dim=3), image.mean(dim=3))
    # At the equator only the highest order lies within rounding of the limit.
    assert (limited - image)[0, 0, 31].abs().max() < 0.01
    assert limited[0, 0, 0].std() < 0.3 * image[0, 0, 0].std()


def test_commutes_with_rolls():
    image = torch.rand(1, 2, 16, 32, dtype=torch.float64)
    torch.testing.assert_close(limit_longitude_band(image.roll(5, -1)), limit_longitude_band(image).roll(5, -1))
    assert limit_longitude_band(image.bfloat16()).dtype == torch.bfloat16
