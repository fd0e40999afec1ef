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

from lightning_plugins import PanoramicDepth, PanoramicUpright, RenderedRooms
from lightning_plugins._support.images import check_panorama, find_panoramas, name_apart, read_panorama
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.engines.sphere import pixel_directions, rotate_in_tiles, rotation_from_up
from lightning_plugins.models.checkpoint import load_module
from lightning_plugins.models.panoramic_depth.metrics import DepthMetrics
from lightning_plugins.models.panoramic_upright.recovery import TiltedRoom, score_ways
from lightning_plugins.recipes.level_then_depth_options import CLI, check_options
from lightning_plugins.recipes.panoramic_upright_files import estimate_up
from lightning_plugins.recipes.phases import fit_phase
from lightning_plugins.recipes.run_loggers import RunLoggers
from lightning_plugins.recipes.turns import waiting_for_first
from lightning_plugins.reporting.figures import curves
from lightning_plugins.reporting.photographs import write_photograph
from lightning_plugins.reporting.report import Figure, Table, Text, write_report
from lightning_plugins.reporting.tables import write_table

# Without photographs, the first of the held-out rooms are shown in their place.
SHOWN_ROOMS = 3
MOST_TILT_DEG = 40
# Below it there is little to recover, and a ratio of small differences says little.
LEAST_TILT_DEG = 10


def main(options: list[str], run: RunFolder, resume: bool) -> None:
    """Train what is not trained yet, evaluate, level and predict, report."""
    cli = CLI(run, options)
    knobs, finished = cli.config, run.read()["finished"]
    # What a user can have got wrong is looked at before the first minute of training.
    photographs = name_apart(find_panoramas(knobs.image)) if knobs.image else {}
    for path in photographs.values():
        check_panorama(path)
    upright = load_module(PanoramicUpright, knobs.upright_ckpt) if knobs.upright_ckpt else None
    depth = load_module(PanoramicDepth, knobs.depth_ckpt) if knobs.depth_ckpt else None
    check_options(cli, options)
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
            scores = evaluate(upright, depth, cli.datamodule, run, knobs.model.preset)
            rows, previews = [], {}
            for name, image in images(photographs, cli.datamodule):
                row, previews[name] = predict(upright, depth, name, image, run)
                rows.append(row)
            write_table(run.path / "levelled.csv", rows)
            report(run, scores, rows, loggers.merge(["upright", "depth"]), previews)
            loggers.show(scores, previews if knobs.wandb_photographs or not photographs else {})


def evaluate(
    upright: PanoramicUpright, depth: PanoramicDepth, rooms: RenderedRooms, run: RunFolder, preset: str
) -> list[dict[str, Any]]:
    """Score the four ways to the depth of a tilted room; write ``evaluation.csv``."""
    level = torch.tensor([0.0, 0.0, 1.0])

    def up_of(image: Tensor) -> Tensor:
        found = upright.predict_up(image)
        return found.up.cpu() if found.is_sure else level

    shown = tqdm(tilted_rooms(rooms), "Scoring", rooms.counts["test"], unit="room", leave=False)
    scores = score_ways(
        shown,
        up_of,
        lambda image: depth(image.to(depth.device)).cpu(),
        # Not synchronized: every image is scored here, whether or not other processes are still there.
        partial(DepthMetrics, preset, sync_on_compute=False),
    )
    write_table(run.path / "evaluation.csv", scores)
    return scores


def tilted_rooms(rooms: RenderedRooms) -> Iterator[TiltedRoom]:
    """Yield the held-out rooms that are tilted by 10 to 40 degrees, and what a level camera sees of them."""
    cache = None if rooms.cache is None else str(rooms.cache)
    kinds = (2 * rooms.height, f"cone:{MOST_TILT_DEG}"), (rooms.height, f"cone:{MOST_TILT_DEG}"), (rooms.height, "cone:0")
    loaders = [
        RenderedRooms(
            test_rooms=rooms.counts["test"], height=height, batch_size=1, seed=rooms.seed, cache=cache, tilt=tilt
        ).evaluation_dataloader()
        for height, tilt in kinds
    ]
    for sharp, tilted, level in zip(*loaders, strict=True):
        if sharp["up"][0, 2] < np.cos(np.radians(LEAST_TILT_DEG)):
            parts = (batch[name][0] for batch in (tilted, level) for name in ("image", "depth", "mask"))
            yield TiltedRoom(sharp["image"][0], sharp["up"][0], *parts)


def images(photographs: dict[str, Path], rooms: RenderedRooms) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield name and pixels of one photograph after the other; without any, of some held-out rooms in their place."""
    for name, path in photographs.items():
        yield name, read_panorama(path)
    if not photographs:
        for number, room in zip(range(SHOWN_ROOMS), tilted_rooms(rooms), strict=False):
            yield f"room_{number}", (255 * room.sharp).round().byte().permute(1, 2, 0).numpy()


def predict(
    upright: PanoramicUpright, depth: PanoramicDepth, name: str, image: NDArray[np.uint8], run: RunFolder
) -> tuple[dict[str, Any], bytes]:
    """Level one photograph, write depth map, point cloud and preview in its level frame; return a row and the preview."""
    found = estimate_up(upright, image)
    rotation = rotation_from_up(found.up) if found.is_sure else torch.eye(3)
    level = rotate_in_tiles(image, rotation)
    depth_m = depth.predict_panorama(torch.from_numpy(level).permute(2, 0, 1).float() / 255).cpu().numpy()
    preview = write_photograph(run.path / "photographs", name, level, depth_m, pixel_directions(*depth_m.shape).numpy())
    row = {
        "name": name,
        "became": "levelled" if found.is_sure else "left as it was: no cue of up",
        "tilt_deg": round(float(torch.rad2deg(torch.acos(rotation[2, 2].clamp(-1, 1)))), 2),
        "expected_error_deg": round(found.expected_error_deg, 2),
    }
    return row | {f"r{i}{j}": float(rotation[i, j]) for i in range(3) for j in range(3)}, preview


def report(
    run: RunFolder,
    scores: list[dict[str, Any]],
    levelled: list[dict[str, Any]],
    metrics: list[dict[str, str]],
    previews: dict[str, bytes],
) -> None:
    """Write ``report.html``: what levelling recovers, curves, photographs."""
    direct, levelled_ours, levelled_truly, level = scores
    summary = (
        f"Of the depth error that tilts of {LEAST_TILT_DEG} to {MOST_TILT_DEG} degrees cost, levelling recovers "
        f"{levelled_ours['recovered_percent']} %; with the true up it would be {levelled_truly['recovered_percent']} %. "
        f"AbsRel {direct['abs_rel']:.3f} directly, {levelled_ours['abs_rel']:.3f} levelled, "
        f"{level['abs_rel']:.3f} from a level camera."
    )
    sections: list[Text | Table | Figure] = [Text([summary]), Table(scores, heading="Held-out rooms")]
    if picture := curves(metrics):
        sections.append(Figure(picture, "Losses and errors against steps.", heading="Training"))
    sections.append(Table(levelled, heading="Levelled", caption="The rotation level = R tilted, row by row; angles in degrees."))
    sections += [Figure(preview, f"{name}, levelled: depth, 0 to 10 m.") for name, preview in previews.items()]
    write_report(run.path / "report.html", "Level, then depth", sections)
