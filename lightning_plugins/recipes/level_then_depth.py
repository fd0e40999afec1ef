"""The recipe ``level_then_depth``: an upright and a depth model, what levelling recovers of depth, both run on photographs.

Training phases are marked in the run folder when they are finished; ``--resume`` goes on at the first unfinished one, at its last
finished epoch. The first process alone evaluates and predicts. The knobs are in ``level_then_depth.yaml``.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lightning_plugins import PanoramicDepth, PanoramicUpright
from lightning_plugins._support.images import find_panoramas, name_apart, read_panorama
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_depth.metrics import DepthMetrics
from lightning_plugins.models.panoramic_upright.levelled_file import check_levelling
from lightning_plugins.models.panoramic_upright.recovery import score_ways
from lightning_plugins.recipes.level_then_depth_files import level_and_measure
from lightning_plugins.recipes.level_then_depth_options import CLI, check_options
from lightning_plugins.recipes.level_then_depth_rooms import MOST_TILT_DEG, TiltedRooms
from lightning_plugins.recipes.phases import fit_phase
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.turns import waiting_for_first
from lightning_plugins.reporting.figures import curves
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.tables import write_table

# Without photographs, the first of the held-out rooms are shown in their place.
SHOWN_ROOMS = 3
# The last one is the report's headline: where cameras are nearly level there is little to recover, and a ratio of small
# differences says little.
TILTS_DEG = {"small": (0, 20), "10 to 40 degrees": (10, MOST_TILT_DEG)}


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet, evaluate, level and predict, report."""
    cli = CLI(run, options)
    knobs, finished = cli.config, run.read()["finished"]
    # What a user can have got wrong is looked at before the first minute of training.
    photographs = name_apart(find_panoramas(knobs.image)) if knobs.image else {}
    for path in photographs.values():
        check_levelling(path)
    upright = load_module(PanoramicUpright, knobs.upright_ckpt) if knobs.upright_ckpt else None
    depth = load_module(PanoramicDepth, knobs.depth_ckpt) if knobs.depth_ckpt else None
    check_options(cli, options, depth)
    loggers = RunLoggers(run, knobs.wandb)

    if upright is None:
        if "upright" not in finished:
            parts = cli.config_init.upright, "panoramic_upright", cli.config_init.upright_data, knobs.upright_epochs
            fit_phase(cli, run, "upright", *parts, loggers, callbacks=[])
        upright = load_module(PanoramicUpright, run.path / "upright.ckpt")
    if depth is None:
        if "depth" not in finished:
            parts = cli.model, cli.model.method, cli.datamodule, knobs.trainer.max_epochs
            fit_phase(cli, run, "depth", *parts, loggers, callbacks=[])
        depth = load_module(PanoramicDepth, run.path / "depth.ckpt")

    with waiting_for_first(cli.trainer.is_global_zero) as is_first:
        if is_first:
            for model in (upright, depth):
                model.to(cli.trainer.strategy.root_device).eval()
            rooms = TiltedRooms(cli.datamodule)
            scores = evaluate(upright, depth, rooms, run, knobs.model.preset)
            rows: list[dict[str, Any]] = []
            previews: dict[str, bytes] = {}
            shown = tqdm(images(photographs, rooms), "Predicting", len(photographs) or SHOWN_ROOMS, unit="image", leave=False)
            for name, image in shown:
                row, pictures = level_and_measure(upright, depth, name, image, run.path / "photographs")
                rows.append(row)
                previews |= pictures
            write_table(run.path / "levelled.csv", rows)
            report(run, scores, rows, loggers.merge(["upright", "depth"]), previews)
            loggers.show(scores, previews if knobs.wandb_photographs or not photographs else {})


def evaluate(
    upright: PanoramicUpright, depth: PanoramicDepth, rooms: TiltedRooms, run: RunFolder, preset: str
) -> list[dict[str, Any]]:
    """Score the four ways to the depth of a tilted room, by tilt; write ``evaluation.csv``."""
    level = torch.tensor([0.0, 0.0, 1.0])

    def up_of(image: Tensor) -> Tensor:
        found = upright.predict_up(image)
        return found.up.cpu() if found.is_sure else level

    scores: list[dict[str, Any]] = []
    for tilt, limits_deg in TILTS_DEG.items():
        # Of a few rooms, none may be tilted like that.
        if chosen := rooms.within(*limits_deg):
            ways = score_ways(
                map(rooms.__getitem__, tqdm(chosen, "Scoring", unit="room", leave=False)),
                up_of,
                lambda image: depth(image.to(depth.device)).cpu(),
                # Not synchronized: every image is scored here, whether or not other processes are still there.
                partial(DepthMetrics, preset, sync_on_compute=False),
            )
            scores += [{"tilt": tilt, **way} for way in ways]
    write_table(run.path / "evaluation.csv", scores)
    return scores


def images(photographs: dict[str, Path], rooms: TiltedRooms) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield name and pixels of one photograph after the other; without any, of some held-out rooms in their place."""
    for name, path in photographs.items():
        yield name, read_panorama(path)
    if not photographs:
        yield from ((f"room_{i}", image) for i, image in enumerate(rooms.cameras[0].image[:SHOWN_ROOMS]))


def report(
    run: RunFolder,
    scores: list[dict[str, Any]],
    levelled: list[dict[str, Any]],
    metrics: list[dict[str, str]],
    previews: dict[str, bytes],
) -> None:
    """Write ``report.html``: what levelling recovers, curves, photographs."""
    direct, levelled_ours, levelled_truly, level = scores[-4:]
    summary = (
        f"Of the depth error that tilts cost ({direct['tilt']}), levelling recovers "
        f"{levelled_ours['recovered_percent']} %; with the true up it would be {levelled_truly['recovered_percent']} %. "
        f"AbsRel {direct['abs_rel']:.3f} directly, {levelled_ours['abs_rel']:.3f} levelled, "
        f"{level['abs_rel']:.3f} from a level camera."
    )
    sections: list[Text | Table | Figure] = [Text([summary]), Table(scores, heading="Held-out rooms")]
    if picture := curves(metrics):
        sections.append(Figure(picture, "Losses and errors against steps.", heading="Training"))
    sections.append(Table(levelled, heading="Levelled", caption="The rotation level = R tilted, row by row; angles in degrees."))
    sections += [Figure(preview, f"{caption}.") for caption, preview in previews.items()]
    write_report(run.path / "report.html", "Level, then depth", sections)
