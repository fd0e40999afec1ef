"""Interpolation tables: for each target the sources it reads, and their weights, which sum to one.

From a grid: nearest pixel, bilinear (4 pixels), or bicubic (16; Keys, "Cubic convolution interpolation", 1981, with a = -1/2,
the value that reproduces quadratics and leaves an error of third order). All read the image padded over seam and poles.
From points: barycentric in the triangle of the points' convex hull that the target's ray meets; on the sphere the hull is the
Delaunay triangulation. No triangulation is built: of all triples near the target with amounts a >= 0 and sum a_i p_i = target,
the hull's is the one whose plane lies farthest out, that is with the least sum of a. A target in a gap of the points, where no
triple of the nearest 24 surrounds it, gets the nearest point.
"""

from itertools import combinations

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.nearest import nearest_points
from lightning_plugins.engines.sphere.padding import pad_equirectangular

# Pixels beyond the image that each mode may read.
MARGINS = {"nearest": 1, "bilinear": 1, "bicubic": 2}
# Near points among which a triangle is sought: enough for near-uniform sets, and a second try for crowded ones.
_CANDIDATES = (9, 24)
_CHUNK = 16384


def margin_of(mode: str) -> int:
    """Return by how many pixels an image is padded on each side before it is read in a mode.

    Raises:
        InputError: if the mode is none of ``MARGINS``.
    """
    if mode not in MARGINS:
        raise InputError(f"mode must be one of {', '.join(MARGINS)}, got {mode!r}; bilinear is the usual one")
    return MARGINS[mode]


def padded_taps(pixels: Tensor, height: int, width: int, mode: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return where each coordinate reads in an equirectangular image that is padded by ``MARGINS[mode]`` and flattened.

    Args:
        pixels: ``(..., 2)``, continuous (u, v) as ``directions_to_pixels`` returns them; differentiable unless the mode is
            nearest.
        height: rows of the image before padding.
        width: columns of the image before padding.
        mode: one of ``MARGINS``.

    Returns:
        The element of the first tap ``(...)`` (int64), the weights of its columns and those of its rows, each ``(...)``.

    Raises:
        InputError: if the mode is another.
    """
    margin = margin_of(mode)
    if mode == "nearest":
        floor = (pixels.detach() + 0.5).floor()
        weights = [torch.ones_like(floor)]
    else:
        floor = pixels.detach().floor()
        weights = _linear(pixels - floor) if mode == "bilinear" else _cubic(pixels - floor)
    stride, taps = width + 2 * margin, len(weights)
    # In all three modes the first tap is one pixel right of, and below, floor in the padded image.
    first = floor.long() + 1
    last = (height + 2 * margin - taps) * stride + stride - taps
    # Clamped for nan alone, so that it comes out as nan and not as a read out of bounds.
    base = (first[..., 1] * stride + first[..., 0]).clamp(0, last)
    return base, [weight[..., 0] for weight in weights], [weight[..., 1] for weight in weights]


def _linear(t: Tensor) -> list[Tensor]:
    return [1 - t, t]


def _cubic(t: Tensor) -> list[Tensor]:
    return [
        ((-0.5 * t + 1) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1,
        ((-1.5 * t + 2) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    ]


def grid_table(pixels: Tensor, height: int, width: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the pixels (row * width + column) and weights, each ``(..., taps)``, that interpolate at coordinates ``(..., 2)``.

    Raises:
        InputError: if the mode is none of ``MARGINS``.
    """
    base, across, down = padded_taps(pixels, height, width, mode)
    margin = MARGINS[mode]
    sources = pad_equirectangular(torch.arange(height * width).view(1, height, width), margin).flatten()
    stride = width + 2 * margin
    index = [sources[base + row * stride + column] for row in range(len(down)) for column in range(len(across))]
    return torch.stack(index, dim=-1), torch.stack([y * x for y in down for x in across], dim=-1)


def points_table(points: Tensor, targets: Tensor, neighbours: int, spacing_rad: float) -> tuple[Tensor, Tensor]:
    """Return the points and weights that interpolate values on points at other directions.

    Args:
        points: ``(N, 3)`` unit vectors, float64.
        targets: ``(T, 3)`` unit vectors, float64.
        neighbours: 3 for the triangle that holds the target, 1 for the nearest point; any other count takes a mean of that many
            nearest points, weighted exp(-(distance / spacing)^2), which pools a fine set onto a coarse one.
        spacing_rad: the spacing of the points.

    Returns:
        Indices (int64) and weights (float64), each ``(T, neighbours)``.

    Raises:
        InputError: if ``neighbours`` is not in 1..N.
    """
    if not 1 <= neighbours <= len(points):
        raise InputError(
            f"neighbours must be between 1 and the number of points, {len(points)}, got {neighbours}; "
            f"3 interpolates, 4 or more pool"
        )
    if neighbours == 3:
        return _hull_table(points, targets)
    index = nearest_points(points, targets, neighbours)
    square = (points[index] - targets[:, None]).square().sum(dim=-1)
    return index, torch.softmax(-square / spacing_rad**2, dim=1)


def _hull_table(points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.empty(len(targets), 3, dtype=torch.int64)
    weight = torch.empty(len(targets), 3, dtype=torch.float64)
    left = torch.arange(len(targets))
    for candidates in _CANDIDATES:
        if len(left) == 0:
            break
        near = nearest_points(points, targets[left], min(candidates, len(points)))
        parts = [
            _triangles(points[some], target) for some, target in zip(near.split(_CHUNK), targets[left].split(_CHUNK), strict=True)
        ]
        corner, amount, found = (torch.cat(part) for part in zip(*parts, strict=True))
        index[left], weight[left] = near.gather(1, corner), amount
        left = left[~found]
    return index, weight


def _triangles(near: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return which three of the near points ``(T, k, 3)`` surround each target, their barycentric weights, and whether any do.

    Where none do, the first near point gets all the weight.
    """
    east = torch.nn.functional.normalize(torch.linalg.cross(_least_axis(targets), targets), dim=-1)
    north = torch.linalg.cross(targets, east)
    x, y, z = (near @ torch.stack((east, north, targets), dim=-1)).unbind(-1)
    # Across the ray the amounts must cancel, sum a x = sum a y = 0: they are the cross products of the other two corners.
    count = near.shape[1]
    cross = {(i, j): x[:, i] * y[:, j] - y[:, i] * x[:, j] for i, j in combinations(range(count), 2)}
    triples = list(combinations(range(count), 3))
    spread = []
    for i, j, k in triples:
        a, b, c = cross[j, k], -cross[i, k], cross[i, j]
        total = a + b + c
        # Inside when all three have the sign of their sum; rounding may put a target on an edge outside both triangles.
        least = torch.minimum(torch.minimum(a * total, b * total), c * total)
        along = a * z[:, i] + b * z[:, j] + c * z[:, k]
        inside = (least >= -1e-9 * total * total) & (total.abs() > 1e-18) & (along * total > 0)
        spread.append(torch.where(inside, total / along, torch.inf))
    least_spread, best = torch.stack(spread).min(dim=0)
    corner = torch.tensor(triples)[best]
    xs, ys = x.gather(1, corner), y.gather(1, corner)
    weight = xs.roll(-1, 1) * ys.roll(-2, 1) - ys.roll(-1, 1) * xs.roll(-2, 1)
    weight = (weight * weight.sum(dim=1, keepdim=True).sign()).clamp(min=0)
    found = least_spread.isfinite()
    corner[~found] = torch.tensor([0, 1, 2])
    weight[~found] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return corner, weight / weight.sum(dim=1, keepdim=True), found


def _least_axis(vectors: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(vectors.abs().argmin(dim=-1), 3).to(vectors.dtype)
