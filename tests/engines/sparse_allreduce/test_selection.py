"""Selecting by magnitude against sorting in numpy: ties, denormals, zeros, blocks, samples that mislead."""

import numpy as np
import pytest
import torch

from lightning_plugins.engines.sparse_allreduce.selection import (
    BLOCK,
    SAMPLE,
    accumulate,
    largest,
    sampled_places,
    sampled_threshold,
    select,
    smallest_threshold,
    trim,
)
from tests.engines.sparse_allreduce import oracle

LONG = 3 * SAMPLE + 11
generator = np.random.default_rng(0)


def misleading(where):
    """Return a long vector whose large entries lie only where a sample looks, or only where it does not."""
    values = generator.standard_normal(LONG) * 1e-3
    values[sampled_places(LONG).numpy() + (where == "unseen")] += 5
    return values


VECTORS = {
    "normal": generator.standard_normal(5000),
    "heavy": generator.standard_t(1, 5000),
    "ties": generator.integers(-4, 5, 5000),
    "equal": np.full(500, -2.5),
    "zeros": np.zeros(500),
    "few": np.where(np.arange(5000) % 1000 == 3, 1.0, 0.0),
    "denormal": generator.integers(-5, 6, 3000) * 2.0**-149,
    "long": generator.standard_normal(LONG),
    "long_ties": generator.integers(-30, 31, LONG),
    "seen": misleading("seen"),
    "unseen": misleading("unseen"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VECTORS)
def test_the_largest_are_those_of_a_sort(name, dtype):
    values = VECTORS[name].astype(dtype)
    for k in (1, 7, len(values) // 100, len(values) // 2, len(values) - 1, len(values), 2 * len(values)):
        if k == 0:
            continue
        indices, threshold = largest(torch.from_numpy(values), k)
        expected = oracle.largest(values, k)
        assert np.array_equal(indices.numpy(), expected), (name, k)
        assert threshold == (np.abs(values[expected]).min() if len(expected) else 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_selecting_is_comparing(dtype):
    """Across the ends of blocks, with the threshold's own magnitude among those selected, and never a zero."""
    values = generator.integers(-9, 10, 2 * BLOCK + 5).astype(dtype)
    values[BLOCK - 1 : BLOCK + 1] = 9
    for threshold in (0.0, smallest_threshold(torch.from_numpy(values).dtype), 0.5, 3.0, 8.5, 9.0, 9.5):
        chosen = select(torch.from_numpy(values), threshold).numpy()
        assert np.array_equal(chosen, np.flatnonzero((np.abs(values) >= threshold) & (values != 0)))
    assert len(select(torch.empty(0), 1.0)) == 0


def test_the_smallest_numbers_are_no_zeros():
    for dtype, smallest in ((torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)):
        assert smallest_threshold(dtype) == smallest
        acc = torch.tensor([0.0, smallest, -smallest, -0.0, 2 * smallest], dtype=dtype)
        assert select(acc, 0.0).tolist() == [1, 2, 4]
        assert select(acc, 2 * smallest).tolist() == [4]


def test_nan_is_never_selected():
    assert select(torch.tensor([float("nan"), 1.0]), 0.5).tolist() == [1]


def test_trimming_keeps_the_first_among_equals():
    indices = torch.tensor([2, 3, 5, 8, 9])
    values = torch.tensor([1.0, -2.0, 2.0, -1.0, 2.0])
    for k, kept, threshold in ((2, [3, 5], 2.0), (3, [3, 5, 9], 2.0), (4, [2, 3, 5, 9], 1.0), (5, [2, 3, 5, 8, 9], 1.0)):
        found, least = trim(indices, values, k)
        assert (found.tolist(), least) == (kept, threshold)
    assert trim(indices, values, 0)[0].tolist() == []
    assert trim(indices[:0], values[:0], 3)[1] == 0.0


def test_a_sample_finds_about_k():
    """Within four standard deviations of k / sqrt(65536 k / n), at every shift of the sample."""
    size, k = 16 * SAMPLE, 10_000
    acc = torch.from_numpy(np.random.default_rng(1).standard_normal(size).astype(np.float32))
    thresholds = {sampled_threshold(acc, k, step) for step in range(20)}
    counts = [len(select(acc, threshold)) for threshold in thresholds]
    assert len(thresholds) > 10
    assert max(abs(count - k) for count in counts) < 4 * k / (SAMPLE * k / size) ** 0.5


def test_a_sample_sees_the_columns_of_a_matrix():
    """Of 2,048 columns of different scale, in rows of as many: even distances would meet the same few again and again."""
    size, k = 1 << 22, 1 << 16
    for step in range(5):
        rng = np.random.default_rng(step)
        columns = np.exp(rng.standard_normal(2048))
        acc = torch.from_numpy((rng.standard_normal((2048, 2048)) * columns).astype(np.float32)).flatten()
        count = len(select(acc, sampled_threshold(acc, k, step)))
        assert abs(count - k) < 5 * k / (SAMPLE * k / size) ** 0.5


def test_zeros_are_not_selected_where_denormals_count_as_zero():
    acc = torch.tensor([0.0, 1.0, 0.0, -2.0])
    torch.set_flush_denormal(True)
    try:
        assert select(acc, 0.0).tolist() == [1, 3]
    finally:
        torch.set_flush_denormal(False)


def test_a_whole_vector_is_its_own_sample():
    acc = torch.tensor([3.0, -1.0, 4.0, -1.5, 0.0])
    assert [sampled_threshold(acc, k) for k in (1, 2, 3, 5, 50)] == [4.0, 3.0, 1.5, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulating_adds(dtype):
    residual = torch.randn(BLOCK + 77, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(BLOCK + 77, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.empty_like(residual)
    assert accumulate(residual, gradient, out, 0.25)
    torch.testing.assert_close(out, residual + gradient.float() / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "finite"),
    [({BLOCK + 2: float("nan")}, False), ({3: float("inf"), 4: -float("inf")}, False), ({1: 3e38, 2: 3e38}, True)],
)
def test_accumulating_tells_whether_the_gradient_is_finite(bad, finite):
    """A block whose sum overflows, or comes to nothing, is looked at entry by entry."""
    gradient = torch.zeros(BLOCK + 5)
    for place, value in bad.items():
        gradient[place] = value
    assert accumulate(torch.zeros_like(gradient), gradient, torch.empty_like(gradient)) is finite
