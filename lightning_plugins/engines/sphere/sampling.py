"""Near-uniform samplings of the sphere.

Fibonacci lattice: z_i = 1 - (2i + 1) / N, azimuth_i = i pi (3 - sqrt 5); every point stands for the same area, any N.
Icosphere: an icosahedron with a vertex at each pole, every edge halved and pushed out to the sphere, ``level`` times; 12 vertices
keep five neighbours, all others have six. Its points are nested: those of a level come first in the next.

Sources: Gonzalez, "Measurement of areas on a sphere using Fibonacci and latitude-longitude lattices", 2010; Baumgardner and
Frederickson, "Icosahedral discretization of the two-sphere", 1985. Both are deterministic and computed in float64.
"""

import math

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError


def fibonacci_sphere(count: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Return ``count`` unit vectors of the Fibonacci lattice, shape ``(count, 3)``, from the zenith down.

    Raises:
        InputError: if ``count`` is below 1.
    """
    if count < 1:
        raise InputError(f"fibonacci_sphere needs a count of 1 or more, got {count}; a few hundred points is a coarse sphere")
    index = torch.arange(count, dtype=torch.float64)
    z = 1 - (2 * index + 1) / count
    azimuth = torch.remainder(index * (math.pi * (3 - math.sqrt(5))), 2 * math.pi)
    radius = (1 - z * z).sqrt()
    return torch.stack((radius * azimuth.cos(), radius * azimuth.sin(), z), dim=-1).to(device=device, dtype=dtype)


def icosphere(level: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Return the vertices of the ``level`` times refined icosahedron, shape ``(10 * 4**level + 2, 3)``.

    Raises:
        InputError: if ``level`` is not in 0..9.
    """
    if not 0 <= level <= 9:
        raise InputError(
            f"icosphere needs a level in 0..9, got {level}; level 4 has 2562 points, every level has 4 times as many"
        )
    points, faces = _icosahedron()
    for _ in range(level):
        points, faces = _refine(points, faces)
    return points.to(device=device, dtype=dtype)


def _icosahedron() -> tuple[Tensor, Tensor]:
    azimuth = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    height, radius = 1 / math.sqrt(5), 2 / math.sqrt(5)
    upper = torch.stack((radius * azimuth.cos(), radius * azimuth.sin(), torch.full_like(azimuth, height)), dim=-1)
    lower = -upper
    pole = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    # Vertices 0: north, 1-5: upper ring, 6-10: lower ring (opposite the upper one, so two and a half steps on), 11: south.
    faces = []
    for i in range(5):
        j = (i + 1) % 5
        below = (i + 3) % 5
        faces += [
            (0, 1 + i, 1 + j),
            (11, 6 + j, 6 + i),
            (1 + i, 6 + below, 1 + j),
            (6 + i, 6 + j, 1 + below),
        ]
    return torch.cat((pole, upper, lower, -pole)), torch.tensor(faces)


def _refine(points: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    edges = torch.cat((faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]])).sort(dim=1).values
    unique, which = torch.unique(edges, dim=0, return_inverse=True)
    middle = torch.nn.functional.normalize(points[unique[:, 0]] + points[unique[:, 1]], dim=-1)
    a, b, c = faces.unbind(1)
    ab, bc, ca = (which + len(points)).view(3, -1).unbind(0)
    quarters = [torch.stack(corners, dim=1) for corners in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))]
    return torch.cat((points, middle)), torch.cat(quarters)
