"""Pictures of optimizers beside each other, and of ways to reduce gradients: loss against steps, seconds or bytes."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png
from lightning_plugins.reporting.sparse_allreduce import COLOURS, SPARE_COLOURS

Curve = Sequence[tuple[float, float]]

HEADROOM = 1.5  # over the first losses: what rises far above them diverges, and would squeeze all else
# First-order rivals are dashed and dark, whoever else takes part.
RIVALS = {"adamw": "black", "sgd": "dimgrey"}


def draw_losses(curves: Mapping[str, Curve], horizontal: str, target: float | None = None, target_name: str = "") -> bytes:
    """Draw losses on a logarithmic scale.

    Args:
        curves: points of each line by its name; losses that are not positive and finite are left out.
        horizontal: name of the first coordinate, with its unit.
        target: a loss to mark with a horizontal line.
        target_name: what it is.

    Returns:
        A PNG image.
    """
    figure = require("matplotlib.figure").Figure(figsize=(11, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = require("matplotlib").colormaps["tab20"].colors
    palette = cycle([colour for colour in colours[::2] + colours[1::2] if len({*colour}) > 1])  # greys are the rivals'
    styles = {
        name: {"color": RIVALS[name], "linestyle": "--", "linewidth": 2.2} if name in RIVALS else {"color": next(palette)}
        for name in curves
    }
    _losses(axes, curves, styles)
    if target is not None:
        axes.axhline(target, color="black", linewidth=0.8, linestyle=":", label=target_name)
    axes.set_xlabel(horizontal)
    axes.set_ylabel("loss on the evaluation set")
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=9)
    return to_png(figure)


def draw_panels(tasks: Mapping[str, Mapping[str, Curve]], horizontal: str, logarithmic: bool = False) -> bytes:
    """Draw losses of ways to reduce gradients on a logarithmic scale, a panel for each task.

    Args:
        tasks: by task, points of each line by its name; losses that are not positive and finite are left out.
        horizontal: name of the first coordinate, with its unit.
        logarithmic: whether it has a logarithmic scale, too; points at 0 are left out then.

    Returns:
        A PNG image.
    """
    figure = require("matplotlib.figure").Figure(figsize=(2 + 5 * len(tasks), 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    spare = cycle(SPARE_COLOURS)
    styles: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for curves in tasks.values() for name in curves):
        # What has no colour of its own is a variant of something that has, and may lie on top of it.
        styles[name] = {"color": COLOURS[name]} if name in COLOURS else {"color": next(spare), "linestyle": "--"}
    for axes, (task, curves) in zip(panels, tasks.items(), strict=True):
        _losses(axes, curves, styles)
        _plain_ticks(axes.yaxis, (1, 1.5, 2, 3, 5, 7))  # reductions are less far apart than optimizers
        axes.set_title(task.replace("_", " "), fontsize=10)
        axes.set_xlabel(horizontal)
        if logarithmic:
            axes.set_xscale("log", nonpositive="mask")
            _plain_ticks(axes.xaxis)
        else:
            axes.set_xlim(left=0)
    panels[0].set_ylabel("loss on the evaluation set")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return to_png(figure)


def _losses(axes: Any, curves: Mapping[str, Curve], styles: Mapping[str, Mapping[str, Any]]) -> None:
    for number, (name, points) in enumerate(curves.items()):
        shown = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
        axes.plot([x for x, _ in shown], [y for _, y in shown], label=name, **styles[name], zorder=2 + number)
    axes.set_yscale("log")
    starts = [points[0][1] for points in curves.values() if points]
    if starts:
        axes.set_ylim(top=HEADROOM * max(starts))
    _plain_ticks(axes.yaxis)
    axes.grid(alpha=0.25)


def _plain_ticks(axis: Any, leading: Sequence[float] = (1, 2, 5)) -> None:
    ticker = require("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(subs=leading, numticks=20))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
