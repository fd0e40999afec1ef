"""A picture of goodput as PNG bytes: the effective share of a run's time against how rarely it fails."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

COLOURS = ("black", "tab:orange", "tab:green", "tab:blue", "tab:red", "tab:purple", "tab:brown", "tab:cyan")

Curve = Sequence[tuple[float, float]]


class Run(NamedTuple):
    """A run that was measured: its MTBF in hours; shares from 0 to 1."""

    mtbf_h: float
    share: float
    standard_error: float
    model_share: float  # by the model, with the run's own constants


def draw_effective_share(
    curves: Mapping[str, Curve],
    runs: Mapping[str, Run] | None = None,
    sources: Mapping[str, float] | None = None,
    title: str = "",
) -> bytes:
    """Draw the model's effective share in percent against the mean time between failures, logarithmic.

    Args:
        curves: ``(hours between failures, share from 0 to 1)`` of each regime.
        runs: measured ones, as dots with an error bar of twice the standard error in the colour of the curve of the same
            name, and as a cross the model with the run's own constants.
        sources: hours between failures that somebody reported, by name; dotted lines.
        title: a line above.

    Returns:
        A PNG image.

    Raises:
        ValueError: if there are more curves than colours, or a run belongs to no curve.
    """
    runs, sources = runs or {}, sources or {}
    if len(curves) > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} curves can be told apart, got {len(curves)}; draw two pictures")
    if foreign := runs.keys() - curves.keys():
        raise ValueError(f"runs must bear the names of curves, got {', '.join(sorted(foreign))}; curves are {', '.join(curves)}")
    figure = require("matplotlib.figure").Figure(figsize=(9, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(curves, COLOURS, strict=False))
    for name, points in curves.items():
        hours, shares = zip(*points, strict=True)
        axes.plot(hours, [100 * share for share in shares], color=colours[name], label=f"model: {name}")
    for name, run in runs.items():
        percent, bar, model = 100 * run.share, 200 * run.standard_error, 100 * run.model_share
        style = {"color": colours[name], "zorder": 5}
        axes.errorbar(run.mtbf_h, percent, bar, fmt="o", markersize=7, capsize=4, label=f"measured: {name}", **style)
        axes.plot(run.mtbf_h, model, "x", markersize=14, label=f"model of that run: {name}", **style)
    for name, mtbf_h in sources.items():
        axes.axvline(mtbf_h, color="dimgrey", linewidth=0.8, linestyle=":")
        transform = axes.get_xaxis_transform()
        axes.text(
            mtbf_h, 0.02, f" {name}", rotation=90, transform=transform, ha="right", va="bottom", fontsize=8, color="dimgrey"
        )
    ticker = require("matplotlib.ticker")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("mean hours between failures of the whole job")
    axes.set_ylim(0, 100)
    axes.set_ylabel("effective share of time, %")
    axes.grid(alpha=0.25)
    if title:
        figure.suptitle(textwrap.fill(title, 100), x=0.01, horizontalalignment="left", fontsize=11, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return to_png(figure)
