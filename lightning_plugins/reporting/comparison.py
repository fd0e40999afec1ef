"""Pictures of optimizers beside each other: loss against steps or seconds, a line each."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

HEADROOM = 1.5  # over the first losses: what rises far above them diverges, and would squeeze all else
# First-order rivals are dashed and dark, whoever else takes part.
RIVALS = {"adamw": "black", "sgd": "dimgrey"}


def draw_losses(
    curves: Mapping[str, Sequence[tuple[float, float]]], horizontal: str, target: float | None = None, target_name: str = ""
) -> bytes:
    """Draw losses on a logarithmic scale.

    Args:
        curves: points of each line by its name; losses that are not positive and finite are left out.
        horizontal: name of the first coordinate, with its unit.
        target: a loss to mark with a horizontal line.
        target_name: what it is.

    Returns:
        A PNG image.
    """
    matplotlib = require("matplotlib")
    figure = require("matplotlib.figure").Figure(figsize=(11, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20"].colors
    palette = cycle([colour for colour in colours[::2] + colours[1::2] if len({*colour}) > 1])  # greys are the rivals'
    for number, (name, points) in enumerate(curves.items()):
        shown = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
        style = {"color": RIVALS[name], "linestyle": "--", "linewidth": 2.2} if name in RIVALS else {"color": next(palette)}
        axes.plot(*zip(*shown, strict=True), label=name, **style, zorder=2 + number)
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":", label=target_name)
    axes.set_yscale("log")
    starts = [points[0][1] for points in curves.values() if points]
    if starts:
        axes.set_ylim(top=HEADROOM * max(starts))
    ticker = require("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(horizontal)
    axes.set_ylabel("loss on the evaluation set")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    return to_png(figure)
