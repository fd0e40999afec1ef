"""A picture of eigenvalues, as PNG bytes: how many there are of which size.

The density falls over many powers of ten from the bulk near 0 to the few large eigenvalues that matter, so its axis is
logarithmic. Below ``FLOOR`` of the highest peak nothing is drawn: there the tails of the broadening are all that is left.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

FLOOR = 1e-6


def spectrum(grid: ArrayLike, densities: Mapping[str, ArrayLike], eigenvalues: ArrayLike = (), title: str | None = None) -> bytes:
    """Draw eigenvalue densities on a logarithmic axis, with ticks at eigenvalues that are known.

    Args:
        grid: eigenvalues, ``(points,)``, ascending.
        densities: by name, each ``(points,)``, per unit of eigenvalue.
        eigenvalues: marked below the curves.
        title: a line above the picture, plain text.

    Returns:
        A PNG image.

    Raises:
        ValueError: if a density does not fit the grid, or none has a positive finite value.
    """
    points = np.asarray(grid, dtype=np.float64)
    curves = {name: np.asarray(density, dtype=np.float64) for name, density in densities.items()}
    _check(points, curves)
    peak = max(float(curve.max()) for curve in curves.values())
    figure = require("matplotlib.figure").Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        drawn = np.maximum(curve, 0.1 * FLOOR * peak)  # out of sight, so that the flanks of a peak reach the axis
        (line,) = axes.plot(points, drawn, linewidth=1.2, label=name)
        axes.fill_between(points, FLOOR * peak, drawn, color=line.get_color(), alpha=0.15, linewidth=0)
    marked = np.asarray(eigenvalues, dtype=np.float64).ravel()
    if marked.size:
        axes.plot(marked, np.full(marked.size, 1.6 * FLOOR * peak), "k|", markersize=9, label="eigenvalues")
    axes.set_yscale("log")
    axes.set_ylim(FLOOR * peak, 3 * peak)
    axes.set_xlim(points[0], points[-1])
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    if title is not None:
        axes.set_title(title, fontsize=10, parse_math=False)
    return to_png(figure)


def _check(grid: NDArray[np.float64], curves: Mapping[str, NDArray[np.float64]]) -> None:
    for name, curve in curves.items():
        if grid.ndim != 1 or curve.shape != grid.shape:
            raise ValueError(f"{name} must have a value for each point of the grid, got shapes {curve.shape} and {grid.shape}")
        if not np.isfinite(curve).all():
            raise ValueError(f"{name} must be finite, got {int((~np.isfinite(curve)).sum())} values that are not")
    if not any((curve > 0).any() for curve in curves.values()):
        raise ValueError("a spectrum needs a density with a value above 0; give densities={'name': values}")
