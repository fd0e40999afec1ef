"""Pictures of sparse allreduce as PNG bytes: bytes, loads, times, losses, selected counts, conservation.

All take plain numbers. A scheme has the same colour in every picture; names that are not known here take what is left.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

COLOURS = {
    "dense": "black",
    "TopkA": "tab:orange",
    "TopkDSA": "tab:green",
    "gTopk": "tab:purple",
    "Gaussian-k": "tab:brown",
    "Ok-Topk": "tab:red",
    "PowerSGD": "tab:cyan",
    "no communication": "silver",
}
SPARE_COLOURS = ("tab:blue", "tab:olive", "tab:pink", "tab:gray", "teal", "darkorange", "indigo", "firebrick")
WIDTH, HEIGHT, PANEL_WIDTH, LEGEND_WIDTH = 9.0, 5.0, 4.4, 1.6  # inches

Curve = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]


def draw_bytes_per_rank(
    curves: Mapping[str, Curve], bound: Band, measured: Mapping[str, Curve] | None = None, title: str = "", bound_name: str = ""
) -> bytes:
    """Draw bytes per rank and step against the number of ranks, both logarithmic, over the band of Ok-Topk's bounds.

    Args:
        curves: ``(ranks, bytes)`` of each scheme.
        bound: ``(ranks, least bytes, most bytes)``, a shaded band.
        measured: ``(ranks, bytes)``, drawn as dots of the scheme's colour.
        title: a line above.
        bound_name: what the band is.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title)
    palette = _palette([*curves, *(measured or {})])
    axes.fill_between(*zip(*bound, strict=True), color="lightcoral", alpha=0.35, linewidth=0, label=bound_name)
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", color=palette[name], label=name)
    for name, points in (measured or {}).items():
        axes.plot(*zip(*points, strict=True), "o", markersize=8, color=palette[name], label=f"{name}, measured", zorder=5)
    _ranks_axis(axes, [ranks for points in curves.values() for ranks, _ in points])
    _logarithmic(axes, "bytes per rank and step", _bytes_text)
    return _with_legend(figure)


def draw_receive_load(loads: Mapping[str, Sequence[float]], bound: float, title: str = "", bound_name: str = "") -> bytes:
    """Draw what each rank receives, bars side by side for each way to cut the vector.

    Args:
        loads: bytes that ranks 0, 1, ... receive, by the name of the cuts.
        bound: bytes that nobody should exceed, a line.
        title: a line above.
        bound_name: what the line is.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title)
    width = 0.8 / max(1, len(loads))
    for number, ((name, values), colour) in enumerate(zip(loads.items(), ("dimgrey", "tab:red", *SPARE_COLOURS), strict=False)):
        places = [rank + (number - (len(loads) - 1) / 2) * width for rank in range(len(values))]
        axes.bar(places, values, width, color=colour, label=name)
    axes.axhline(bound, color="black", linestyle="--", linewidth=1, label=bound_name)
    axes.set_xlabel("rank")
    axes.set_xticks(range(max(map(len, loads.values()))))
    axes.set_ylabel("bytes received")
    axes.yaxis.set_major_formatter(require("matplotlib.ticker").FuncFormatter(_bytes_text))
    axes.grid(alpha=0.25, axis="y")
    return _with_legend(figure)


def crossovers(curve: Curve, baseline: Curve) -> list[tuple[float, float]]:
    """Return where two curves over the same coordinates cross, interpolated in both logarithms.

    Raises:
        ValueError: if the coordinates differ, or something is not positive.
    """
    if [x for x, _ in curve] != [x for x, _ in baseline] or min((*sum(curve, ()), *sum(baseline, ())), default=1) <= 0:
        raise ValueError("crossovers need two curves over the same coordinates, all positive")
    points = [
        (math.log(x), math.log(y), math.log(y) - math.log(other)) for (x, y), (_, other) in zip(curve, baseline, strict=True)
    ]
    found = []
    for (x, y, above), (next_x, next_y, next_above) in pairwise(points):
        if above * next_above < 0 or (above == 0 and next_above != 0):
            share = above / (above - next_above)
            found.append((math.exp(x + share * (next_x - x)), math.exp(y + share * (next_y - y))))
    return found


def draw_step_times(curves: Mapping[str, Curve], baseline: str, title: str = "") -> bytes:
    """Draw the time of a step against the bandwidth, both logarithmic, and mark where schemes cross the baseline.

    Args:
        curves: ``(bits per second, seconds)`` of each scheme, all over the same bandwidths.
        baseline: the scheme that the others are compared with.
        title: a line above.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title)
    palette = _palette(curves)
    for name, points in curves.items():
        found = crossovers(points, curves[baseline]) if name != baseline else []
        label = "".join([name, *(f"\n= {baseline} at {_bits_text(bandwidth)}" for bandwidth, _ in found)])
        axes.plot(*zip(*points, strict=True), marker=".", color=palette[name], label=label)
        for bandwidth, seconds in found:
            axes.plot(bandwidth, seconds, "o", markersize=10, markerfacecolor="none", color=palette[name])
            axes.axvline(bandwidth, color=palette[name], linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticker = require("matplotlib.ticker")
    axes.xaxis.set_major_locator(ticker.LogLocator(numticks=20))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_bits_text))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("bandwidth of each rank's link")
    _logarithmic(axes, "seconds per step", _seconds_text)
    return _with_legend(figure)


def draw_training(runs: Mapping[str, Mapping[str, Sequence[float]]], quantities: Sequence[str], title: str = "") -> bytes:
    """Draw the losses of several runs, a panel for each quantity that they are drawn against.

    Args:
        runs: by name: ``loss`` and each of ``quantities``, sequences of equal length.
        quantities: such as ``step``, ``seconds`` or ``bytes sent``; the names stand at the axes.
        title: a line above.

    Returns:
        A PNG image.
    """
    figure, panels = _figure(title, columns=len(quantities))
    palette = _palette(runs)
    for axes, quantity in zip(panels, quantities, strict=True):
        for name, run in runs.items():
            axes.plot(run[quantity], run["loss"], color=palette[name], linewidth=1.4, label=name)
        axes.set_xlabel(quantity)
        axes.set_xlim(left=0)
        if "byte" in quantity:
            axes.xaxis.set_major_formatter(require("matplotlib.ticker").FuncFormatter(_bytes_text))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss")
    return _with_legend(figure)


def draw_selected(policies: Mapping[str, Curve], title: str = "") -> bytes:
    """Draw how many entries each threshold policy selected, over how many it should, against steps.

    Args:
        policies: ``(step, selected / k)`` of each policy.
        title: a line above.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title)
    palette = _palette(policies)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="k")
    for name, points in policies.items():
        axes.plot(*zip(*points, strict=True), color=palette[name], label=name)
    axes.set_xlabel("step")
    axes.set_yscale("log")
    ticker = require("matplotlib.ticker")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel("selected / k")
    axes.grid(alpha=0.25)
    return _with_legend(figure)


def draw_breakdown(seconds: Mapping[str, Mapping[str, float]], title: str = "") -> bytes:
    """Draw of what a step's time is made up, a stacked bar for each run.

    Args:
        seconds: by run, then by phase; a phase has the same colour in all runs.
        title: a line above.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title, height=1.2 + 0.55 * len(seconds))
    phases = list(dict.fromkeys(phase for run in seconds.values() for phase in run))
    colours = require("matplotlib").colormaps["tab20"].colors
    left = [0.0] * len(seconds)
    for number, phase in enumerate(phases):
        widths = [1e3 * run.get(phase, 0.0) for run in seconds.values()]
        colour = colours[2 * number % 20 + (number // 10) % 2]
        axes.barh(list(seconds), widths, left=left, color=colour, label=phase.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:,.0f}" if total >= 100 else f" {total:.3g}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(left, default=1))
    axes.set_xlabel("ms per step")
    axes.grid(alpha=0.25, axis="x")
    return _with_legend(figure)


def draw_scaling(bands: Mapping[str, Band], title: str = "") -> bytes:
    """Draw simulated step times against the number of ranks, for the fastest and for the slowest assumptions.

    Args:
        bands: ``(ranks, least seconds, most seconds)`` of each scheme.
        title: a line above; that the numbers are simulated is said at the axis.

    Returns:
        A PNG image.
    """
    figure, panels = _figure(title, columns=2)
    palette = _palette(bands)
    for column, (axes, words) in enumerate(zip(panels, ("fast", "slow"), strict=True), start=1):
        for name, points in bands.items():
            axes.plot([p[0] for p in points], [p[column] for p in points], marker=".", color=palette[name], label=name)
        _ranks_axis(axes, [point[0] for points in bands.values() for point in points])
        axes.set_title(f"{words} assumptions", fontsize=10)
        _logarithmic(axes, "simulated seconds per step" if column == 1 else "", _seconds_text)
    return _with_legend(figure)


def draw_mass(traces: Mapping[str, Curve], title: str = "") -> bytes:
    """Draw by how much the mass of update and residuals misses that of the gradients, against steps.

    Args:
        traces: ``(step, error relative to the mass)`` of each run; the axis is logarithmic down to a tenth of the least of them,
            and has an exact 0 below.
        title: a line above.

    Returns:
        A PNG image.
    """
    figure, (axes,) = _figure(title)
    palette = _palette(traces)
    errors = [abs(error) for points in traces.values() for _, error in points if error]
    least = min([*errors, 1e-3]) / 10
    for number, (name, points) in enumerate(traces.items()):
        # The first lies on top: where others are 0 as well they would hide it.
        style = {"color": palette[name], "marker": ".", "markersize": 2, "zorder": 10 - number}
        axes.plot([step for step, _ in points], [abs(error) for _, error in points], label=name, **style)
    axes.set_xlabel("step")
    axes.set_yscale("symlog", linthresh=least)
    axes.set_ylim(-least / 3, 2 * max([*errors, least]))
    axes.set_ylabel("|residuals + update - gradients| / |gradients|")
    axes.grid(alpha=0.25)
    return _with_legend(figure)


def _figure(title: str, height: float = HEIGHT, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure and its panels, with the title at the left, where it keeps off the legend."""
    width = WIDTH if columns == 1 else PANEL_WIDTH * columns + LEGEND_WIDTH
    figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=100, layout="constrained")
    panels = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    if title:
        figure.suptitle(textwrap.fill(title, 90), x=0.01, horizontalalignment="left", fontsize=11, parse_math=False)
    return figure, panels


def _palette(names: Iterable[str]) -> dict[str, Any]:
    spare = cycle(SPARE_COLOURS)
    return {name: COLOURS[name] if name in COLOURS else next(spare) for name in dict.fromkeys(names)}


def _with_legend(figure: Any) -> bytes:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return to_png(figure)


def _ranks_axis(axes: Any, ranks: Iterable[float]) -> None:
    axes.set_xscale("log", base=2)
    shown = sorted({*ranks})
    axes.set_xticks(shown, [f"{number:g}" for number in shown])
    axes.minorticks_off()
    axes.set_xlabel("ranks")


def _logarithmic(axes: Any, name: str, text: Any) -> None:
    ticker = require("matplotlib.ticker")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=20))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(text))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)


def _scaled(value: float, units: Sequence[str], start: float) -> str:
    unit = 0
    value /= start
    while abs(value) >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:g} {units[unit]}"


def _bytes_text(value: float, _: int = 0) -> str:
    return "0" if value == 0 else _scaled(float(f"{value:.3g}"), ("B", "kB", "MB", "GB", "TB"), 1)


def _bits_text(value: float, _: int = 0) -> str:
    return _scaled(float(f"{value:.2g}"), ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"), 1)


def _seconds_text(value: float, _: int = 0) -> str:
    return "0" if value == 0 else _scaled(float(f"{value:.3g}"), ("us", "ms", "s"), 1e-6)
