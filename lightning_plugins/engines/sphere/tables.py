"""Interpolation tables: for each target the sources it reads, and their weights, which sum to one.

From a grid: nearest pixel, bilinear (4 pixels), or bicubic (16; Keys, "Cubic convolution interpolation", 1981, with a = -1/2, the value
that reproduces quadratics and leaves an error of third order). Pixels beyond a pole are those across it, half a turn around.
From points: barycentric in the triangle of the points' convex hull that the target's ray meets; on the sphere the hull is the Delaunay
triangulation. No triangulation is built: of all triples near the target with amounts a >= 0 and sum a_i p_i = target, the hull's is the one
whose plane lies farthest out, that is with the least sum of a.
"""

from itertools import combinations

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.nearest import nearest_points

MODES = ("nearest", "bilinear", "bicubic")
_CANDIDATES = 9
_CHUNK = 16384


def grid_taps(u: Tensor, v: Tensor, height: int, width: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pixels and weights that interpolate an equirectangular image at continuous pixel coordinates.

    Args:
        u: columns, any shape; differentiable.
        v: rows, the same shape, in [-0.5, height - 0.5].
        mode: one of ``MODES``.

    Returns:
        Rows in 0..height-1, columns (not yet taken modulo the width; both int64) and weights, each ``(..., taps)``.

    Raises:
        InputError: if the mode is another.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}; bilinear is the usual one")
    if mode == "nearest":
        column = torch.floor(u.detach() + 0.5).long()[..., None]
        row = torch.floor(v.detach() + 0.5).long().clamp(0, height - 1)[..., None]
        return row, column, torch.ones_like(u)[..., None]
    first_u, first_v = torch.floor(u.detach()), torch.floor(v.detach())
    weights = _linear if mode == "bilinear" else _cubic
    across, down = weights(u - first_u), weights(v - first_v)
    taps = across.shape[-1]
    steps = torch.arange(taps, device=u.device) - (taps // 2 - 1)
    row = (first_v.long()[..., None] + steps)[..., :, None].expand(*u.shape, taps, taps).flatten(-2)
    column = (first_u.long()[..., None] + steps)[..., None, :].expand(*u.shape, taps, taps).flatten(-2)
    over_north, over_south = row < 0, row >= height
    column = column + (over_north | over_south) * (width // 2)
    row = torch.where(over_north, -1 - row, torch.where(over_south, 2 * height - 1 - row, row))
    return row, column, (down[..., :, None] * across[..., None, :]).flatten(-2)


def _linear(t: Tensor) -> Tensor:
    return torch.stack((1 - t, t), dim=-1)


def _cubic(t: Tensor) -> Tensor:
    return torch.stack(
        (
            ((-0.5 * t + 1) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1,
            ((-1.5 * t + 2) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        ),
        dim=-1,
    )


def points_taps(points: Tensor, targets: Tensor, neighbours: int, spacing_rad: float) -> tuple[Tensor, Tensor]:
    """Return the points and weights that interpolate values on points at other directions.

    Args:
        points: ``(N, 3)`` unit vectors, float64.
        targets: ``(T, 3)`` unit vectors, float64.
        neighbours: 3 for the triangle that holds the target, 1 for the nearest point; any other count takes a mean of that many nearest
            points, weighted exp(-(distance / spacing)^2), which pools a fine set onto a coarse one.
        spacing_rad: the spacing of the points.

    Returns:
        Indices (int64) and weights (float64), each ``(T, neighbours)``.

    Raises:
        InputError: if ``neighbours`` is not in 1..N.
    """
    if not 1 <= neighbours <= len(points):
        raise InputError(
            f"neighbours must be between 1 and the number of points, {len(points)}, got {neighbours}; 3 interpolates, 4 or more pool"
        )
    if neighbours == 3:
        near = nearest_points(points, targets, min(_CANDIDATES, len(points)))
        triples = torch.tensor(list(combinations(range(near.shape[1]), 3)))
        parts = [_triangles(points, targets[rows], near[rows], triples) for rows in torch.arange(len(targets)).split(_CHUNK)]
        return torch.cat([index for index, _ in parts]), torch.cat([weight for _, weight in parts])
    index = nearest_points(points, targets, neighbours)
    square = (points[index] - targets[:, None]).square().sum(dim=-1)
    return index, torch.softmax(-square / spacing_rad**2, dim=1)


def _triangles(points: Tensor, targets: Tensor, near: Tensor, triples: Tensor) -> tuple[Tensor, Tensor]:
    corners = points[near]
    east = torch.nn.functional.normalize(torch.linalg.cross(_least_axis(targets), targets), dim=-1)
    north = torch.linalg.cross(targets, east)
    x, y, z = ((corners * axis[:, None]).sum(dim=-1) for axis in (east, north, targets))
    # Across the ray the amounts must cancel: sum a x = sum a y = 0. So they are the three cross products of the corners' pairs.
    cross = (x[:, :, None] * y[:, None, :] - y[:, :, None] * x[:, None, :]).flatten(1)
    first, second, third = triples.unbind(1)
    count = near.shape[1]
    amounts = torch.stack([cross[:, i * count + j] for i, j in ((second, third), (third, first), (first, second))], dim=-1)
    total = amounts.sum(dim=-1)
    amounts, total = amounts * total.sign()[..., None], total.abs()
    along = sum(amounts[..., i] * z[:, corner] for i, corner in enumerate((first, second, third)))
    assert isinstance(along, Tensor)
    holds = (amounts >= -1e-9 * total[..., None]).all(dim=-1) & (total > 1e-18) & (along > 0)
    best = (total / along).masked_fill(~holds, float("inf")).argmin(dim=1)
    rows = torch.arange(len(targets))
    index = near[rows[:, None], triples[best]]
    weight = amounts[rows, best].clamp(min=0)
    # Where the points leave a gap as wide as a hemisphere no triangle holds the target: the nearest point answers.
    lost = ~holds.any(dim=1)
    index[lost] = near[lost, :3]
    weight[lost] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return index, weight / weight.sum(dim=1, keepdim=True)


def _least_axis(vectors: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(vectors.abs().argmin(dim=-1), 3).to(vectors.dtype)
