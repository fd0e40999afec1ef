"""Pictures of depth and of training, as PNG bytes.

Depth is drawn on a fixed scale in metres, so that two pictures can be compared, near in red and far in blue (turbo
reversed, which shows the small steps of a room's near range better than one hue does); the absolute error on a scale of a
fifth of that range.
Pixels without a value are grey. matplotlib is used through its object interface: no global figure, no display.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.tables import columns_of

DEPTH_COLOURS = "turbo_r"
ERROR_COLOURS = "inferno"
HOLE = 150
ERROR_SHARE = 0.2

# What a logged name must contain to be drawn, by panel; the first panel that fits takes it.
PANELS = {
    "loss": ("loss",),
    "error": ("abs_rel", "mae", "rmse", "error"),
    "share within a factor": ("delta",),
    "error, degrees": ("mean_deg", "median_deg"),
    "share within an angle": ("within_",),
}
SMOOTH_ABOVE = 100

Points = NDArray[np.float64]  # (2, points): steps, values


def depth_to_rgb(
    depth_m: NDArray[np.floating], near_m: float, far_m: float, mask: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Colour a depth map on the fixed scale from ``near_m`` to ``far_m``.

    Args:
        depth_m: ``(height, width)``, metres; beyond the ends it takes the colour of the end.
        near_m: depth of the first colour.
        far_m: depth of the last colour.
        mask: ``(height, width)``, false at holes, which are grey; so are depths that are not finite.

    Returns:
        ``(height, width, 3)`` RGB.

    Raises:
        ValueError: if ``far_m`` does not exceed ``near_m``.
    """
    return _coloured(depth_m, near_m, far_m, mask, DEPTH_COLOURS)


def depth_preview(
    image: NDArray[np.uint8],
    depth_m: NDArray[np.floating],
    truth_m: NDArray[np.floating] | None = None,
    mask: NDArray[np.bool_] | None = None,
    near_m: float = 0.0,
    far_m: float = 10.0,
    title: str | None = None,
) -> bytes:
    """Draw a photograph beside its predicted depth and, where the truth is known, above the truth and the absolute error.

    Args:
        image: ``(rows, columns, 3)`` RGB, of any size.
        depth_m: ``(height, width)``, the prediction in metres.
        truth_m: ``(height, width)``, metres.
        mask: ``(height, width)``, true where the truth is valid.
        near_m: depth of the first colour, the same for prediction and truth.
        far_m: depth of the last colour.
        title: a line above the panels.

    Returns:
        A PNG image.
    """
    error_far_m = ERROR_SHARE * (far_m - near_m)
    figure = require("matplotlib.figure").Figure(figsize=(12, 3.3 if truth_m is None else 6.1), dpi=100, layout="constrained")
    axes = figure.subplots(1 if truth_m is None else 2, 2, squeeze=False)
    _panel(axes[0, 0], image, "photograph")
    _panel(axes[0, 1], depth_to_rgb(depth_m, near_m, far_m), "predicted depth")
    _colour_bar(figure, axes[:, 1], near_m, far_m, DEPTH_COLOURS)
    if truth_m is not None:
        error_m = np.abs(depth_m.astype(np.float64) - truth_m)
        valid = np.isfinite(error_m) if mask is None else np.isfinite(error_m) & mask.astype(bool)
        mean = f", mean {error_m[valid].mean():.2f} m" if valid.any() else ""
        _panel(axes[1, 0], _coloured(error_m, 0.0, error_far_m, valid, ERROR_COLOURS), f"absolute error{mean}")
        _colour_bar(figure, axes[1, 0], 0.0, error_far_m, ERROR_COLOURS)
        _panel(axes[1, 1], depth_to_rgb(truth_m, near_m, far_m, mask), "true depth")
    if title is not None:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return to_png(figure)


def curves(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Draw losses and errors against steps, a line of panels for each phase.

    Args:
        rows: metrics by name, as ``tables.merge_metrics`` or ``tables.read_metrics`` return them: ``step``, ``phase`` where
            there are several, and any others, of which those that are losses, errors or deltas are drawn.

    Returns:
        A PNG image, or None if there is nothing to draw.
    """
    phases = {
        phase: _series([row for row in rows if row.get("phase", "") == phase])
        for phase in dict.fromkeys(row.get("phase", "") for row in rows)
    }
    phases = {phase: panels for phase, panels in phases.items() if panels}
    if not phases:
        return None
    width = max(len(panels) for panels in phases.values())
    figure = require("matplotlib.figure").Figure(figsize=(12, 3.4 * len(phases)), dpi=100, layout="constrained")
    grid = figure.subplots(len(phases), width, squeeze=False)
    for line, (phase, panels) in zip(grid, phases.items(), strict=True):
        for axes, (quantity, series) in zip(line, panels.items(), strict=False):
            _curve_panel(axes, series, f"{phase}: {quantity}" if phase else quantity)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
    return to_png(figure)


def _coloured(
    values: NDArray[np.floating], low: float, high: float, mask: NDArray[np.bool_] | None, colours: str
) -> NDArray[np.uint8]:
    if not high > low:
        raise ValueError(f"far_m must exceed near_m, got {low} to {high}; rooms fit 0 to 10")
    valid = np.isfinite(values) if mask is None else np.isfinite(values) & mask.astype(bool)
    share = np.clip((np.where(valid, values, low) - low) / (high - low), 0, 1)
    rgb = require("matplotlib").colormaps[colours](share, bytes=True)[..., :3]
    return np.where(valid[..., None], rgb, np.uint8(HOLE)).astype(np.uint8)


def _panel(axes: Any, rgb: NDArray[np.uint8], title: str) -> None:
    axes.imshow(rgb, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _colour_bar(figure: Any, axes: Any, low: float, high: float, colours: str) -> None:
    scale = require("matplotlib.colors").Normalize(low, high)
    mappable = require("matplotlib.cm").ScalarMappable(scale, colours)
    figure.colorbar(mappable, ax=axes, label="metres", shrink=0.85, fraction=0.04, aspect=18, pad=0.02, extend="max")


def _panel_of(column: str) -> str | None:
    return next((panel for panel, words in PANELS.items() if any(word in column.lower() for word in words)), None)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Sort the columns that are drawn into their panels."""
    panels: dict[str, dict[str, Points]] = {}
    for column in columns_of(rows):
        panel = _panel_of(column)
        if panel is not None:
            points = [(float(row["step"]), float(row[column])) for row in rows if row.get(column, "") != ""]
            panels.setdefault(panel, {})[column] = np.array(points).T
    return {panel: panels[panel] for panel in PANELS if panel in panels}


def _curve_panel(axes: Any, series: Mapping[str, Points], title: str) -> None:
    for name, (steps, values) in series.items():
        if len(steps) < SMOOTH_ABOVE:
            axes.plot(steps, values, marker="o", markersize=3, label=name)
            continue
        (line,) = axes.plot(steps, values, linewidth=0.6, alpha=0.3)
        window = len(steps) // (SMOOTH_ABOVE // 2)
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        centres = steps[(window - 1) // 2 : (window - 1) // 2 + len(mean)]
        axes.plot(centres, mean, color=line.get_color(), label=f"{name}, mean of {window}")
    values = np.concatenate([values for _, values in series.values()])
    if "loss" in title and (values > 0).all():
        axes.set_yscale("log")
        ticker = require("matplotlib.ticker")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def to_png(figure: Any) -> bytes:
    """Return a figure of matplotlib's as a PNG image."""
    encoded = io.BytesIO()
    # Without the version of matplotlib in it, the same data give the same bytes.
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).print_png(encoded, metadata={"Software": None})
    return encoded.getvalue()
