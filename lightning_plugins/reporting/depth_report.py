"""The pictures and the page of a depth model's training, from samples and logged metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins.reporting.figures import curves, depth_preview
from lightning_plugins.reporting.report import Figure, Section, Table, Text, write_report
from lightning_plugins.reporting.samples import Sample

ELSEWHERE = "free space there, or give PanoramaReport(folder=...) another place"


@dataclass(frozen=True)
class Scale:
    """The depths of the first and the last colour, the same for every picture of a training."""

    near_m: float
    far_m: float


@dataclass(frozen=True)
class Preview:
    """A drawn sample, where it lies on the disk, and its errors."""

    path: Path
    figure: Figure
    errors: Mapping[str, float]


def draw_previews(folder: Path, epoch: int, samples: Sequence[Sample], scale: Scale) -> list[Preview]:
    """Draw each sample into ``folder/epoch_XXX_sample_Y.png``.

    Raises:
        InputError: if a file cannot be written.
    """
    previews = []
    for number, sample in enumerate(samples):
        caption = f"Epoch {epoch}, sample {number}"
        maps = (sample.prediction_m, sample.depth_m, sample.mask)
        png = depth_preview(sample.image, *maps, near_m=scale.near_m, far_m=scale.far_m, title=caption)
        path = folder / f"epoch_{epoch:03d}_sample_{number}.png"
        try:
            with atomic_write(path) as file:
                file.write(png)
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror or error}); {ELSEWHERE}") from error
        previews.append(Preview(path, Figure(png, caption, heading="" if number else "Samples"), sample.errors()))
    return previews


def write_depth_report(
    path: Path,
    title: str,
    summary: str,
    final: Mapping[str, float],
    logged: Sequence[Mapping[str, Any]],
    previews: Sequence[Preview],
    scale: Scale,
) -> None:
    """Write the page: summary, final metrics, curves, samples with error maps, and the samples' errors.

    Args:
        path: the HTML file to write.
        title: heading of the page.
        summary: one paragraph.
        final: the last value of each metric.
        logged: rows of metrics over the steps, as ``tables.read_metrics`` returns them.
        previews: the drawn samples.
        scale: the scale that they were drawn on.

    Raises:
        InputError: if the file cannot be written.
    """
    sections: list[Section] = [Text([summary])]
    if final:
        rows = [{"metric": name, "value": value} for name, value in sorted(final.items())]
        sections.append(Table(rows, heading="Metrics", caption="As last logged."))
    picture = curves(logged)
    if picture is not None:
        sections.append(Figure(picture, "Losses and errors against steps.", heading="Curves"))
    sections += [preview.figure for preview in previews]
    if previews:
        rows = [{"sample": number, **preview.errors} for number, preview in enumerate(previews)]
        drawn = f"The scale of all pictures is fixed, {scale.near_m:g} to {scale.far_m:g} m; grey: no value."
        sections.append(Table(rows, heading="Errors of the samples", caption=f"Means over the valid pixels. {drawn}"))
    try:
        write_report(path, title, sections)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); {ELSEWHERE}") from error
