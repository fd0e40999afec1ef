"""The recipe ``panoramic_depth``: teacher, student, evaluation beside two trivial predictors, photographs, report.

Training phases are marked in the run folder when they are finished; ``--resume`` goes on at the first unfinished one, at its last
finished epoch. The first process alone evaluates and predicts. The knobs are in ``panoramic_depth.yaml``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lightning_plugins import PanoramaReport, PanoramicDepth, RenderedRooms
from lightning_plugins._support.images import check_panorama, find_panoramas, name_apart, read_panorama
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.engines.sphere import pixel_directions
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_depth.baselines import trivial_predictors
from lightning_plugins.models.panoramic_depth.evaluation import Predictor, score
from lightning_plugins.recipes.panoramic_depth_options import CLI, check_options
from lightning_plugins.recipes.phases import fit_phase
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.turns import waiting_for_first
from lightning_plugins.reporting.figures import curves
from lightning_plugins.reporting.photographs import write_photograph
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.tables import write_table

# Without photographs, the first of the held-out rooms are shown in their place.
SHOWN_ROOMS = 3


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet, evaluate, predict, report."""
    cli = CLI(run, options)
    knobs, finished = cli.config, run.read()["finished"]
    # What a user can have got wrong is looked at before the first minute of training.
    photographs = name_apart(find_panoramas(knobs.image)) if knobs.image else {}
    for path in photographs.values():
        check_panorama(path)
    trained = load_module(PanoramicDepth, knobs.ckpt) if knobs.ckpt else None
    check_options(cli, options)
    loggers = RunLoggers(run, knobs.wandb)

    if trained is None:
        if cli.makes_teacher and cli.model.teacher_path and "teacher" not in finished:
            teacher = cli.config_init.teacher
            fit_phase(cli, run, "teacher", teacher, teacher.method, cli.datamodule, knobs.teacher_epochs, loggers, callbacks=[])
        if "student" not in finished:
            epochs = knobs.trainer.max_epochs
            # Once, after the last epoch.
            pictures = PanoramaReport(samples=SHOWN_ROOMS, every_n_epochs=epochs or 1)
            fit_phase(cli, run, "student", cli.model, cli.model.method, cli.datamodule, epochs, loggers, callbacks=[pictures])
        trained = load_module(PanoramicDepth, run.path / "student.ckpt")

    with waiting_for_first(cli.trainer.is_global_zero) as is_first:
        if is_first:
            trained.to(cli.trainer.strategy.root_device)
            scores = evaluate(trained, cli.datamodule, run, knobs.model.preset)
            shown = tqdm(
                images(photographs, cli.datamodule), "Predicting", len(photographs) or SHOWN_ROOMS, unit="image", leave=False
            )
            previews = {name: predict(trained, name, image, run) for name, image in shown}
            report(run, scores, loggers.merge(["teacher", "student"]), previews)
            loggers.show(scores, previews if knobs.wandb_photographs or not photographs else {})


def evaluate(student: PanoramicDepth, rooms: RenderedRooms, run: RunFolder, preset: str) -> list[dict[str, Any]]:
    """Score the student and the trivial predictors on the held-out rooms; write ``evaluation.csv``."""
    known = rooms.rooms("train")
    predictors: dict[str, Predictor] = {"student": lambda image: student(image.to(student.device))}
    for name, depth_m in trivial_predictors(known.depth_m, known.mask).items():
        predictors[name] = partial(expand, torch.from_numpy(depth_m))
    scores = score(predictors, tqdm(rooms.evaluation_dataloader(), "Scoring", unit="batch", leave=False), preset)
    write_table(run.path / "evaluation.csv", scores)
    return scores


def expand(depth_m: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Return the same depth ``(H, W)`` for each image of a batch."""
    return depth_m.expand(len(image), 1, *depth_m.shape)


def images(photographs: dict[str, Path], rooms: RenderedRooms) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield name and pixels of one photograph after the other; without any, of some held-out rooms in their place."""
    for name, path in photographs.items():
        yield name, read_panorama(path)
    if not photographs:
        yield from ((f"room_{i}", image) for i, image in enumerate(rooms.rooms("test").image[:SHOWN_ROOMS]))


def predict(student: PanoramicDepth, name: str, image: NDArray[np.uint8], run: RunFolder) -> bytes:
    """Write depth map, point cloud and preview of one photograph to ``photographs/``; return the preview."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    depth_m = student.predict_panorama(pixels).cpu().numpy()
    return write_photograph(run.path / "photographs", name, image, depth_m, pixel_directions(*depth_m.shape).numpy())


def report(run: RunFolder, scores: list[dict[str, Any]], metrics: list[dict[str, str]], previews: dict[str, bytes]) -> None:
    """Write ``report.html``: scores, curves, held-out rooms with their errors, photographs."""
    student, best = scores[0]["abs_rel"], min(row["abs_rel"] for row in scores[1:])
    summary = (
        f"AbsRel {student:.3f} on {scores[0]['images']} held-out rooms; the best predictor that sees no image has {best:.3f}."
    )
    sections: list[Text | Table | Figure] = [
        Text([summary]),
        Table(scores, heading="Held-out rooms", caption=f"Protocol: {scores[0]['preset']}. Depths in metres."),
    ]
    if picture := curves(metrics):
        sections.append(Figure(picture, "Losses and errors against steps.", heading="Curves"))
    for path in sorted((run.path / "previews").glob("*.png"))[-SHOWN_ROOMS:]:
        sections.append(Figure(path.read_bytes(), f"Validation room, {path.stem.replace('_', ' ')}: prediction, truth, error."))
    for name, preview in previews.items():
        sections.append(Figure(preview, f"{name}: depth, 0 to 10 m."))
    write_report(run.path / "report.html", "Panoramic depth", sections)
