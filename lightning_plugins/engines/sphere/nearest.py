"""The nearest points of a set, exactly, without a quadratic search.

The sphere is divided among about sqrt(N) centres. A target t in the share of centre c has its k nearest points within 2 |t - c| + d_k(c) of c,
where d_k(c) is the distance from c to its own k-th point (triangle inequality): so each share is searched in that ball alone.
Cost: about T sqrt(N) distances for T targets, instead of T N.
"""

import math

import torch
from torch import Tensor

from lightning_plugins.engines.sphere.sampling import fibonacci_sphere


def nearest_points(points: Tensor, targets: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` points nearest to each target, nearest first.

    Args:
        points: ``(N, 3)`` unit vectors, float64.
        targets: ``(T, 3)`` unit vectors, float64.
        count: 1 to N.

    Returns:
        ``(T, count)``, int64.
    """
    centres = fibonacci_sphere(max(1, math.isqrt(len(points)) // 2), dtype=torch.float64)
    to_centre, share = _closest_centre(targets, centres)
    centre_to_points = torch.cdist(centres, points)
    kth = centre_to_points.kthvalue(count, dim=1).values
    order = share.argsort(stable=True)
    sizes = torch.bincount(share, minlength=len(centres)).tolist()
    result = torch.empty(len(targets), count, dtype=torch.int64)
    for centre, members in enumerate(order.split(sizes)):
        if len(members) == 0:
            continue
        radius = 2 * to_centre[members].max() + kth[centre] + 1e-9
        candidates = (centre_to_points[centre] <= radius).nonzero().squeeze(1)
        for chunk in members.split(8192):
            distance = _squared_distance(targets[chunk], points[candidates])
            result[chunk] = candidates[distance.topk(count, dim=1, largest=False).indices]
    return result


def _closest_centre(targets: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    distance, share = zip(*(torch.cdist(chunk, centres).min(dim=1) for chunk in targets.split(65536)), strict=True)
    return torch.cat(distance), torch.cat(share)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
