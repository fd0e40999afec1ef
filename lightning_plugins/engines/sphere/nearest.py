"""The nearest points of a set, exactly, without comparing every pair.

The sphere is divided among centres. A target t in the share of centre c has its k nearest points within 2 |t - c| + d_k(c) of
c, where d_k(c) is the distance from c to its own k-th point (triangle inequality): each share is searched in that ball alone.
Cost: about T sqrt(N) comparisons for T targets among N points, instead of T N.
"""

import math

import torch
from torch import Tensor

from lightning_plugins.engines.sphere.sampling import fibonacci_sphere

_CHUNK = 8192


def nearest_points(points: Tensor, targets: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` points nearest to each target, nearest first.

    Args:
        points: ``(N, 3)`` unit vectors, float64, on the CPU.
        targets: ``(T, 3)`` unit vectors, likewise.
        count: 1 to N.

    Returns:
        ``(T, count)``, int64.
    """
    centres = fibonacci_sphere(1 + math.isqrt(len(points)), dtype=torch.float64)
    cosine, share = zip(*((chunk @ centres.T).max(dim=1) for chunk in targets.split(_CHUNK)), strict=True)
    to_centre = _chord(torch.cat(cosine))
    order = torch.cat(share)
    sizes = torch.bincount(order, minlength=len(centres)).tolist()
    centre_to_points = _chord(centres @ points.T)
    kth = centre_to_points.kthvalue(count, dim=1).values
    result = torch.empty(len(targets), count, dtype=torch.int64)
    for centre, members in enumerate(order.argsort(stable=True).split(sizes)):
        if len(members) == 0:
            continue
        radius = 2 * to_centre[members].max() + kth[centre] + 1e-7
        candidates = (centre_to_points[centre] <= radius).nonzero().squeeze(1)
        near = points[candidates].T
        for chunk in members.split(_CHUNK):
            result[chunk] = candidates[(targets[chunk] @ near).topk(count, dim=1).indices]
    return result


def _chord(cosine: Tensor) -> Tensor:
    return (2 - 2 * cosine).clamp(min=0).sqrt()
