"""Pictures of a run that was killed and went on, beside the same run left alone, as PNG bytes."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

from lightning_plugins._support.optional import require
from lightning_plugins.reporting.figures import to_png

ALONE_COLOUR = "#d0d0d0"
KILL_COLOUR = "tab:red"
# Of one start after the other.
START_COLOURS = ("tab:blue", "tab:green", "tab:purple", "tab:orange")
# Half of a difference's axis where there is none: well below what float32 tells apart in losses near 1.
_NOTHING = 1e-8

Curve = Sequence[tuple[float, float]]


class Death(NamedTuple):
    """A kill.

    Attributes:
        seconds: of the run.
        step: the last one before it.
        process: which was killed.
        resumed_after: the step that the run went on after.
        back_s: seconds of the run at the first step after it.
    """

    seconds: float
    step: int
    process: int
    resumed_after: int
    back_s: float


def draw_losses(alone: Curve, starts: Sequence[Curve], deaths: Sequence[Death]) -> bytes:
    """Draw the losses of both runs against steps, one on top of the other, and below them how much they differ.

    Args:
        alone: ``(step, loss)`` of the run that was left alone, a broad pale line.
        starts: the same of each start of the killed run, thin lines; steps that were done twice are in two of them.
        deaths: dotted lines at their steps; what was done twice is shaded.

    Returns:
        A PNG image.
    """
    figure = require("matplotlib.figure").Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot(*_columns(alone), color=ALONE_COLOUR, linewidth=7, label="left alone", solid_capstyle="butt")
    expected, differences = dict(alone), [0.0]
    for number, (points, colour) in enumerate(zip(starts, cycle(START_COLOURS), strict=False)):
        above.plot(*_columns(points), color=colour, linewidth=1.1, label=_name(number))
        apart = [(step, loss - expected[step]) for step, loss in points if step in expected]
        below.plot(*_columns(apart), color=colour, linewidth=1.4)
        differences += [abs(difference) for _, difference in apart if math.isfinite(difference)]
    for number, death in enumerate(deaths):
        for axes in (above, below):
            axes.axvline(death.step, color=KILL_COLOUR, linewidth=1.3, linestyle=":")
            axes.axvspan(death.resumed_after, death.step, color=KILL_COLOUR, alpha=0.12, linewidth=0)
        above.text(
            death.step,
            0.985 - 0.05 * (number % 3),
            f" process {death.process} killed",
            transform=above.get_xaxis_transform(),
            va="top",
            fontsize=8,
            color=KILL_COLOUR,
        )
    above.set_ylabel("training loss")
    above.set_ylim(0, 1.15 * max((loss for _, loss in alone if math.isfinite(loss)), default=1.0))
    largest = max(differences)
    below.set_ylim(*((-1.1 * largest, 1.1 * largest) if largest else (-_NOTHING, _NOTHING)))
    below.set_ylabel("difference")
    below.set_title(f"largest difference: {largest:g}", fontsize=9, loc="right")
    below.set_xlabel("optimizer steps")
    _finish(figure, (above, below))
    return to_png(figure)


def draw_progress(alone: Curve, starts: Sequence[Curve], deaths: Sequence[Death]) -> bytes:
    """Draw the steps of both runs against seconds: how far each kill threw the run back, and for how long it stood.

    Args:
        alone: ``(seconds, step)`` of the run that was left alone.
        starts: the same of each start of the killed run.
        deaths: crosses, each with the seconds until the next step.

    Returns:
        A PNG image.
    """
    figure = require("matplotlib.figure").Figure(figsize=(11, 6.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(*_columns(alone), color=ALONE_COLOUR, linewidth=7, label="left alone", solid_capstyle="butt")
    for number, (points, colour) in enumerate(zip(starts, cycle(START_COLOURS), strict=False)):
        axes.plot(*_columns(points), color=colour, linewidth=2, label=_name(number))
    for number, death in enumerate(deaths):
        axes.plot(
            death.seconds,
            death.step,
            "x",
            color=KILL_COLOUR,
            markersize=11,
            markeredgewidth=2.5,
            zorder=5,
            label="SIGKILL" if number == 0 else None,
        )
        across = [death.seconds, death.back_s], [death.step, death.resumed_after + 1]
        axes.plot(*across, color=KILL_COLOUR, linewidth=1, linestyle=":")
        lost = death.step - death.resumed_after
        axes.annotate(
            f"{death.back_s - death.seconds:.1f} s to the next step,\n{lost} step{'' if lost == 1 else 's'} done again",
            (death.back_s, death.resumed_after),
            xytext=(8, -2),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=8,
            color=KILL_COLOUR,
        )
    axes.set_xlabel("seconds since the first start began to train")
    axes.set_ylabel("optimizer steps")
    axes.set_ylim(bottom=0)
    _finish(figure, (axes,))
    return to_png(figure)


def _name(number: int) -> str:
    return f"killed run, start {number + 1}"


def _columns(points: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(figure: Any, panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=9)
