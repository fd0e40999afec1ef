"""Which entries of a vector are the largest: selection by a threshold, and the ways to find the threshold.

    selected(acc, t) = { i : |acc_i| >= t and acc_i != 0 }

``torch.topk`` over the whole vector costs several passes; a threshold that is known costs one, made here in blocks that stay in
the processor's cache, together with adding the residual. The exact threshold is found among candidates: a quantile of a sample,
set low, leaves little more than k of them.
"""

import math

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 17  # elements; a block of float32 and its magnitudes fit the second-level cache
SAMPLE = 1 << 16
CANDIDATES = 1.3  # times k: how many the sample is asked for, so that missing k is rare


def smallest_threshold(dtype: torch.dtype) -> float:
    """Return the least positive number of a dtype: the threshold that selects whatever is not zero."""
    return 5e-324 if dtype == torch.float64 else 2.0**-149


def accumulate(residual: Tensor, gradient: Tensor, out: Tensor, factor: float = 1.0) -> bool:
    """Write ``residual + factor * gradient`` into ``out`` and return whether the gradient is finite.

    Args:
        residual: ``(n,)``.
        gradient: ``(n,)``, of any floating type.
        out: ``(n,)``, of the residual's type.
        factor: undoes a loss scale.
    """
    finite = True
    block = BLOCK if out.device.type == "cpu" else max(1, len(out))
    for start in range(0, len(out), block):
        part = gradient[start : start + block]
        torch.add(residual[start : start + block], part.to(out.dtype), alpha=factor, out=out[start : start + block])
        # One number tells nearly always; only a sum that overflows by itself asks for a look at every entry.
        finite = finite and (math.isfinite(float(part.sum())) or bool(part.isfinite().all()))
    return finite


def select(acc: Tensor, threshold: float) -> Tensor:
    """Return the sorted indices, ``int64``, of the entries with at least this magnitude; zeros are never among them.

    Args:
        acc: ``(n,)``.
        threshold: 0 stands for whatever is not zero.
    """
    if threshold <= smallest_threshold(acc.dtype):
        return acc.nonzero().flatten()
    if acc.device.type != "cpu":
        return (acc.abs() >= threshold).nonzero().flatten()
    entries, found = acc.numpy(), []  # on one core numpy compares and searches about twice as fast as torch
    magnitudes = np.empty(min(BLOCK, len(entries)), dtype=entries.dtype)
    large = np.empty(len(magnitudes), dtype=np.bool_)
    for start in range(0, len(entries), BLOCK):
        part = entries[start : start + BLOCK]
        np.abs(part, out=magnitudes[: len(part)])
        np.greater_equal(magnitudes[: len(part)], threshold, out=large[: len(part)])
        found.append(np.flatnonzero(large[: len(part)]) + start)
    return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)


def count_reaching(values: Tensor, threshold: float) -> int:
    """Return how many entries have at least this magnitude; zeros are never among them."""
    if threshold <= smallest_threshold(values.dtype):
        return int(values.count_nonzero())
    return int((values.abs() >= threshold).sum())


def sampled_threshold(acc: Tensor, k: float, step: int = 0) -> float:
    """Return the magnitude that about ``k`` entries reach, from a sample of 65,536.

    Args:
        acc: ``(n,)``, not empty.
        k: wanted count; the standard deviation of what is found is about ``k / sqrt(65536 k / n)``.
        step: chooses the sample, so that the same entries are not looked at every time.
    """
    sample = acc[sampled_places(len(acc), step).to(acc.device)].abs()
    rank = min(len(sample), max(1, round(k * len(sample) / len(acc))))
    return _kth_largest(sample, rank)


def sampled_places(length: int, step: int = 0) -> Tensor:
    """Return positions to look at: one at random in each of 65,536 equal parts, or all of a shorter vector.

    Evenly spaced ones would see a few columns of a matrix and no others.
    """
    if length <= SAMPLE:
        return torch.arange(length)
    stride = length // SAMPLE
    random = np.random.default_rng(step).integers(stride, size=length // stride)
    return torch.from_numpy(random + stride * np.arange(length // stride))


def largest(acc: Tensor, k: int) -> tuple[Tensor, float]:
    """Return the sorted indices of exactly the ``k`` largest magnitudes, and the least of these magnitudes.

    Equal magnitudes go by index, lowest first. Zeros are never selected: there may be fewer than ``k``.

    Args:
        acc: ``(n,)``, finite.
        k: 1 or more.
    """
    if len(acc) == 0:
        return torch.empty(0, dtype=torch.int64, device=acc.device), 0.0
    low = sampled_threshold(acc, CANDIDATES * k + 16) if CANDIDATES * k < len(acc) else 0.0
    candidates = select(acc, low)
    if len(candidates) < k and low > 0.0:
        candidates = select(acc, 0.0)
    return trim(candidates, acc[candidates], k)


def trim(indices: Tensor, values: Tensor, k: int) -> tuple[Tensor, float]:
    """Return those of sorted ``indices`` whose ``values`` are the ``k`` largest in magnitude, and the least magnitude kept.

    Equal magnitudes go by index, lowest first. Where there are no more than ``k``, all stay.
    """
    if len(indices) == 0 or k <= 0:
        return indices[:0], 0.0
    magnitudes = values.abs()
    if len(indices) <= k:
        return indices, float(magnitudes.min())
    threshold = _kth_largest(magnitudes, k)
    kept = magnitudes > threshold
    ties = (magnitudes == threshold).nonzero().flatten()
    kept[ties[: k - int(kept.sum())]] = True
    return indices[kept], threshold


def _kth_largest(magnitudes: Tensor, k: int) -> float:
    if magnitudes.device.type == "cpu":  # numpy's is several times as fast as torch's on one core
        place = len(magnitudes) - k
        return float(np.partition(magnitudes.numpy(), place)[place])
    return float(magnitudes.topk(k).values[-1])
