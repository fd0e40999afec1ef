"""The recipe ``panoramic_upright``: training, evaluation beside lines and identity, photographs and a video levelled, report.

The training is marked in the run folder when it is finished; ``--resume`` goes on at its last finished epoch. The first process
alone evaluates and levels. The knobs are in ``panoramic_upright.yaml``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lightning_plugins import PanoramicUpright, RenderedRooms
from lightning_plugins._support.images import find_panoramas, name_apart, read_panorama
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_upright.evaluation import Errors, errors_deg, rivals, score
from lightning_plugins.models.panoramic_upright.levelled_file import check_levelling
from lightning_plugins.recipes.panoramic_upright_files import level_photograph, level_room, level_the_video
from lightning_plugins.recipes.panoramic_upright_options import CLI, check_options
from lightning_plugins.recipes.phases import fit_phase
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.turns import waiting_for_first
from lightning_plugins.reporting.figures import curves
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.tables import write_table
from lightning_plugins.reporting.upright_report import draw_cumulative, draw_errors

TILTS = {"small": "within 20 degrees", "sphere": "any tilt"}
# Without photographs, the first of the held-out rooms are shown in their place.
SHOWN_ROOMS = 3


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet, evaluate, level, report."""
    cli = CLI(run, options)
    knobs = cli.config
    # What a user can have got wrong is looked at before the first minute of training.
    photographs = name_apart(find_panoramas(knobs.image)) if knobs.image else {}
    for path in photographs.values():
        check_levelling(path, knobs.tags_only)
    trained = load_module(PanoramicUpright, knobs.ckpt) if knobs.ckpt else None
    check_options(cli, options)
    loggers = RunLoggers(run, knobs.wandb)

    if trained is None:
        if "upright" not in run.read()["finished"]:
            epochs = knobs.trainer.max_epochs
            fit_phase(cli, run, "upright", cli.model, "panoramic_upright", cli.datamodule, epochs, loggers, callbacks=[])
        trained = load_module(PanoramicUpright, run.path / "upright.ckpt")

    with waiting_for_first(cli.trainer.is_global_zero) as is_first:
        if is_first:
            trained.to(cli.trainer.strategy.root_device).eval()
            scores, pictures = evaluate(trained, cli.datamodule, run)
            levelled, previews = level(trained, photographs, cli.datamodule, run, knobs.tags_only)
            video = level_the_video(trained, knobs.video, run) if knobs.video else []
            report(run, scores, pictures, loggers.merge(["upright"]), levelled, previews, video)
            shown = previews if knobs.wandb_photographs or not photographs else {}
            loggers.show(scores, pictures | shown, "upright")


def evaluate(model: PanoramicUpright, rooms: RenderedRooms, run: RunFolder) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Judge network, lines and identity on held-out rooms; write ``evaluation.csv``; return its rows and two pictures."""
    scores: list[dict[str, Any]] = []
    errors: dict[str, Errors] = {}
    for tilt, title in TILTS.items():
        images = tqdm(
            held_out(rooms, tilt, rooms.counts["test"]), f"Scoring, {title}", rooms.counts["test"], unit="room", leave=False
        )
        errors[title] = errors_deg({"network": lambda image: model.predict_up(image).up, **rivals(tilt)}, images)
        scores += score(errors[title], tilt)
    write_table(run.path / "evaluation.csv", scores)
    return scores, {"cumulative curve": draw_cumulative(errors), "errors": draw_errors(errors)}


def held_out(rooms: RenderedRooms, tilt: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image and up of the first test rooms, tilted so, at twice the height: lines need it, and photographs have it."""
    cache = None if rooms.cache is None else str(rooms.cache)
    sharper = RenderedRooms(test_rooms=count, height=2 * rooms.height, batch_size=1, seed=rooms.seed, cache=cache, tilt=tilt)
    for batch in sharper.evaluation_dataloader():
        yield batch["image"][0], batch["up"][0]


def level(
    model: PanoramicUpright, photographs: dict[str, Path], rooms: RenderedRooms, run: RunFolder, tags_only: bool
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Level the photographs, or some held-out rooms; write ``levelled.csv``; return its rows, and previews by name."""
    rows, previews = [], {}
    for name, path in tqdm(photographs.items(), "Levelling", unit="image", leave=False):
        row, previews[name] = level_photograph(model, name, path, read_panorama(path), run.path / "photographs", tags_only)
        rows.append(row)
    if not photographs:
        for number, (image, _) in enumerate(held_out(rooms, "small", SHOWN_ROOMS)):
            pixels: NDArray[np.uint8] = (255 * image).round().byte().permute(1, 2, 0).numpy()
            row, previews[f"room_{number}"] = level_room(model, f"room_{number}", pixels, run.path / "photographs")
            rows.append(row)
    write_table(run.path / "levelled.csv", rows)
    return rows, previews


def report(
    run: RunFolder,
    scores: list[dict[str, Any]],
    pictures: dict[str, bytes],
    metrics: list[dict[str, str]],
    levelled: list[dict[str, Any]],
    previews: dict[str, bytes],
    video: list[str],
) -> None:
    """Write ``report.html``: scores, their curves, the training's, photographs before and after."""
    shares = [f"{scores[0][f'within_{limit}_deg']:g}" for limit in (1, 2, 3, 5)]
    summary = (
        f"Within 1, 2, 3 and 5 degrees of the true up in {', '.join(shares[:-1])} and {shares[-1]} % of {scores[0]['images']} "
        "held-out rooms, tilted by up to 20 degrees."
    )
    sections: list[Text | Table | Figure] = [
        Text([summary]),
        Table(
            scores,
            heading="Held-out rooms",
            caption="Percent of images within so many degrees of the true up, and the mean error.",
        ),
        *(Figure(picture, f"Held-out rooms: {name}.") for name, picture in pictures.items()),
    ]
    if picture := curves(metrics):
        sections.append(Figure(picture, "Losses and errors against steps.", heading="Training"))
    sections.append(Table(levelled, heading="Levelled", caption="Rotations are in levelled.csv; angles in degrees."))
    sections += [Figure(preview, f"{name}, before and after.") for name, preview in previews.items()]
    if video:
        sections.append(Text(video, heading="Video"))
    write_report(run.path / "report.html", "Panoramic upright", sections)
