"""Where the values of a spherical signal live: on the pixels of an equirectangular grid, or on a set of points.

Both say how many nodes there are, in which shape, in which directions, and how far apart: ``spacing_rad`` is pi / H for a
grid (its spacing along every meridian) and sqrt(4 pi / N) for points (the side of a node's share of the sphere).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.sphere.directions import check_size, pixel_directions


@dataclass(frozen=True)
class EquirectangularGrid:
    """The pixel centres of an equirectangular image; signals have shape ``(B, C, height, width)``.

    Raises:
        InputError: if the height is below 1 or the width odd.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        check_size(self.height, self.width)
        if self.width % 2:
            raise InputError(
                f"an equirectangular grid needs an even number of columns (across a pole lies column u + W/2), "
                f"got {self.height} x {self.width}; resize_equirectangular makes the width even"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.height, self.width)

    @property
    def node_count(self) -> int:
        return self.height * self.width

    @property
    def spacing_rad(self) -> float:
        return math.pi / self.height

    def directions(self) -> Tensor:
        """Return the unit directions of the nodes in float64 on the CPU, shape ``(node_count, 3)``, row after row."""
        return pixel_directions(self.height, self.width, dtype=torch.float64).view(-1, 3)


class SpherePoints:
    """A set of points on the sphere; signals have shape ``(B, C, N)``.

    Args:
        points: ``(N, 3)`` directions, of any length but zero; a copy is kept in float64 on the CPU.

    Raises:
        InputError: if the shape is another, there are fewer than 4 points, or one is zero or not finite.
    """

    def __init__(self, points: Tensor) -> None:
        if points.ndim != 2 or points.shape[1] != 3 or len(points) < 4:
            raise InputError(
                f"points must have shape (N, 3) with N of 4 or more, got {tuple(points.shape)}; "
                f"fibonacci_sphere and icosphere make such sets"
            )
        points = points.detach().to(device="cpu", dtype=torch.float64)
        length = points.norm(dim=1, keepdim=True)
        if not bool(((length > 0) & length.isfinite()).all()):
            raise InputError("points must be finite and not zero, got one that is not; remove it, it has no direction")
        self._points = points / length

    def __repr__(self) -> str:
        return f"SpherePoints({self.node_count} points)"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.node_count,)

    @property
    def node_count(self) -> int:
        return len(self._points)

    @property
    def spacing_rad(self) -> float:
        return math.sqrt(4 * math.pi / self.node_count)

    def directions(self) -> Tensor:
        """Return the unit directions of the nodes in float64 on the CPU, shape ``(node_count, 3)``."""
        return self._points


Domain = EquirectangularGrid | SpherePoints
