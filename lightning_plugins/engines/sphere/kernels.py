"""The kernel of a spherical convolution: a centre and rings of points at equal angular distance, carried to every node.

At the north pole ring r has M_r points at angular distance rho_r and azimuths 2 pi m / M_r. Rz(azimuth) Ry(colatitude) carries
them to a node, where azimuth 0 of the kernel points south along the node's meridian. At the poles, where all meridians meet, it
is that of the forward direction. The signal is read at the carried points: bilinear on a grid, barycentric among points.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import directions_to_pixels
from lightning_plugins.engines.sphere.domains import Domain, EquirectangularGrid
from lightning_plugins.engines.sphere.tables import grid_table, points_table

Rings = Sequence[tuple[int, float]]


def kernel_points(rings: Rings, spacing_rad: float) -> Tensor:
    """Return the kernel's points about the north pole, the centre first, shape ``(1 + sum of counts, 3)``, float64.

    Raises:
        InputError: if a ring has no point, or its radius is not between 0 and half a turn.
    """
    points = [torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)]
    for count, radius in rings:
        angle = radius * spacing_rad
        if count < 1 or not 0 < angle < math.pi:
            raise InputError(
                f"a ring needs 1 point or more and a radius between 0 and 180 degrees, got {count} points at {radius} node "
                f"spacings, here {math.degrees(angle):.1f} degrees; give a smaller radius or a finer domain"
            )
        azimuth = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        height = torch.full_like(azimuth, math.cos(angle))
        points.append(torch.stack((math.sin(angle) * azimuth.cos(), math.sin(angle) * azimuth.sin(), height), dim=-1))
    return torch.cat(points)


def carry_kernel(kernel: Tensor, nodes: Tensor) -> Tensor:
    """Return kernel points ``(K, 3)`` carried to nodes ``(N, 3)`` by Rz(azimuth) Ry(colatitude), shape ``(N, K, 3)``."""
    x, y, z = nodes.unbind(-1)
    radius = torch.hypot(x, y)
    is_pole = radius < 1e-7
    cosine = (x / radius).masked_fill(is_pole, 1.0)
    sine = (y / radius).masked_fill(is_pole, 0.0)
    # The columns of the rotation: where south, left and up of the north pole's kernel go.
    south = torch.stack((z * cosine, z * sine, -radius), dim=-1)
    left = torch.stack((-sine, cosine, torch.zeros_like(z)), dim=-1)
    return torch.einsum("kj,njd->nkd", kernel, torch.stack((south, left, nodes), dim=1))


def kernel_table(domain: Domain, rings: Rings, isotropic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sparse matrix that takes a signal on a domain to the terms of the product at each node.

    A term is one point of the kernel, or, if isotropic, the mean over a ring; the centre is the first.

    Returns:
        Rows (node * terms + term), columns (nodes; both int64) and weights (float64), each ``(node_count, points, taps)``.

    Raises:
        InputError: as ``kernel_points``.
    """
    kernel = kernel_points(rings, domain.spacing_rad)
    index, weight = _grid(domain, kernel) if isinstance(domain, EquirectangularGrid) else _points(domain, kernel)
    if isotropic:
        counts = torch.tensor([1, *(count for count, _ in rings)])
        term = torch.arange(len(counts)).repeat_interleave(counts)
        weight = weight / counts[term][:, None]
    else:
        term = torch.arange(len(kernel))
    row = torch.arange(domain.node_count)[:, None] * (term.max() + 1) + term
    return row[:, :, None].expand_as(index), index, weight


def _points(domain: Domain, kernel: Tensor) -> tuple[Tensor, Tensor]:
    nodes = domain.directions()
    index, weight = points_table(nodes, carry_kernel(kernel, nodes).flatten(0, 1), 3, domain.spacing_rad)
    return index.unflatten(0, (len(nodes), len(kernel))), weight.unflatten(0, (len(nodes), len(kernel)))


def _grid(domain: EquirectangularGrid, kernel: Tensor) -> tuple[Tensor, Tensor]:
    height, width = domain.shape
    first_column = domain.directions().view(height, width, 3)[:, 0]
    pixels = directions_to_pixels(carry_kernel(kernel, first_column), height, width)
    index, weight = grid_table(pixels, height, width, "bilinear")
    # One pattern a row, moved by whole columns: so that rolling the input rolls the output.
    column = (index.remainder(width)[:, None] + torch.arange(width)[:, None, None]).remainder(width)
    index = (index // width * width)[:, None] + column
    return index.flatten(0, 1), weight[:, None].expand(index.shape).flatten(0, 1)
