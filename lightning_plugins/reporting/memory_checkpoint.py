"""A picture of how long saves hold up a training, as PNG bytes."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

COLOURS = ("black", "tab:red", "tab:orange", "tab:brown", "tab:purple", "tab:blue", "tab:green", "tab:cyan")


class Blocked(NamedTuple):
    """What saves of one size cost; MB are 10^6 bytes."""

    state_mb: float
    median_ms: float
    p99_ms: float
    longer_ms: float  # steps after the save, more than usual; may be negative


def draw_blocked_times(measured: Mapping[str, Sequence[Blocked]], title: str = "") -> bytes:
    """Draw blocked milliseconds against the state's size, both logarithmic.

    Args:
        measured: of each way to save. A dot is a median, the line up from it ends at the 99th percentile, and a ring stands at
            the median with the longer steps added, where these add something.
        title: a line above.

    Returns:
        A PNG image.

    Raises:
        ValueError: if there are more ways than colours, or a time is not above 0.
    """
    if len(measured) > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} ways to save can be told apart, got {len(measured)}; draw two pictures")
    for name, points in measured.items():
        if wrong := [point for point in points if min(point.median_ms, point.p99_ms, point.state_mb) <= 0]:
            raise ValueError(f"sizes and times must be above 0 to be drawn on logarithmic axes, got {wrong[0]} for {name}")
    figure = require("matplotlib.figure").Figure(figsize=(9, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(measured.items(), COLOURS, strict=False):
        sizes, medians = [point.state_mb for point in points], [point.median_ms for point in points]
        axes.plot(sizes, medians, color=colour, linewidth=1.2)
        reach = [[0.0] * len(points), [max(0.0, point.p99_ms - point.median_ms) for point in points]]
        axes.errorbar(sizes, medians, reach, fmt="o", markersize=6, capsize=4, color=colour, label=name)
        with_steps = [(point.state_mb, point.median_ms + point.longer_ms) for point in points if point.longer_ms > 0]
        if with_steps:
            axes.plot(*zip(*with_steps, strict=True), "o", markersize=9, fillstyle="none", color=colour)
    ticker = require("matplotlib.ticker")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(
        ticker.FixedLocator(sorted({point.state_mb for points in measured.values() for point in points}))
    )
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("MB of state: parameters and moments")
    axes.set_ylabel("ms per save: dot blocked, bar to p99, ring with longer steps")
    axes.grid(alpha=0.25)
    if title:
        figure.suptitle(textwrap.fill(title, 100), x=0.01, horizontalalignment="left", fontsize=11, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return to_png(figure)
