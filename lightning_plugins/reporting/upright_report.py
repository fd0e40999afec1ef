"""Pictures of what an upright model finds: shares of images within an angle, errors, photographs before and after; PNG bytes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

Errors = Mapping[str, NDArray[np.float64]]  # degrees, by predictor
PANELS_A_LINE = 2
CURVE_TO_DEG = 12.0
BINS = 36
HORIZON_COLOUR = "#ff3b30"


def draw_cumulative(errors: Mapping[str, Errors], up_to_deg: float = CURVE_TO_DEG) -> bytes:
    """Draw the share of images whose estimate is wrong by less than an angle, a panel for each set of images.

    Args:
        errors: by the title of the panel.
        up_to_deg: end of the angles' axis.

    Returns:
        A PNG image.
    """
    figure, panels = _panels(len(errors))
    for axes, (title, of_set) in zip(panels, errors.items(), strict=False):
        for name, values in of_set.items():
            steps = np.concatenate([[0.0], np.sort(values), [max(up_to_deg, float(values.max()))]])
            share = 100 * np.minimum(np.arange(len(steps)), len(values)) / len(values)
            axes.step(steps, share, where="post", label=name)
        axes.set(title=f"{title} ({len(next(iter(of_set.values())))} images)", xlim=(0, up_to_deg), ylim=(0, 101))
        axes.set(xlabel="error below, degrees", ylabel="% of images")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    return to_png(figure)


def draw_errors(errors: Mapping[str, Errors]) -> bytes:
    """Draw histograms of the errors on a logarithmic axis of degrees, a panel for each set of images.

    Args:
        errors: by the title of the panel.

    Returns:
        A PNG image.
    """
    figure, panels = _panels(len(errors))
    edges = np.geomspace(0.05, 180, BINS)
    for axes, (title, of_set) in zip(panels, errors.items(), strict=False):
        for name, values in of_set.items():
            axes.hist(np.clip(values, edges[0], edges[-1]), bins=edges, histtype="step", linewidth=1.5, label=name)
        axes.set(title=title, xscale="log", xlabel="error, degrees", ylabel="images")
        axes.xaxis.set_major_formatter(require("matplotlib.ticker").StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return to_png(figure)


def draw_before_and_after(before: NDArray[np.uint8], after: NDArray[np.uint8], title: str) -> bytes:
    """Draw a photograph as it was and levelled, the middle row of each marked: where the horizon belongs.

    Args:
        before: ``(H, W, 3)`` RGB.
        after: ``(H, W, 3)`` RGB.
        title: a line above them.

    Returns:
        A PNG image.
    """
    figure = require("matplotlib.figure").Figure(figsize=(12, 3.5), dpi=100, layout="constrained")
    for axes, image, name in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        axes.imshow(image, interpolation="nearest")
        axes.axhline(len(image) / 2 - 0.5, color=HORIZON_COLOUR, linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    figure.suptitle(title, fontsize=12, parse_math=False)
    return to_png(figure)


def _panels(count: int) -> tuple[Any, list[Any]]:
    lines, columns = math.ceil(count / PANELS_A_LINE), min(count, PANELS_A_LINE)
    figure = require("matplotlib.figure").Figure(figsize=(6 * columns, 3.8 * lines), dpi=100, layout="constrained")
    panels = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels
