"""What the recipe ``panoramic_upright`` makes of one photograph, a held-out room or a video."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins import PanoramicUpright
from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import resize_panorama
from lightning_plugins._support.run_folder import RunFolder
from lightning_plugins.engines.sphere import rotate_in_tiles, rotation_from_up
from lightning_plugins.models.panoramic_upright.levelled_file import LevelledFile, level_file
from lightning_plugins.models.panoramic_upright.network import UpEstimate
from lightning_plugins.models.panoramic_upright.video import level_video
from lightning_plugins.reporting.upright_report import draw_before_and_after

PREVIEW_ROWS = 384
# Up is looked for in far fewer rows; the floats of a large photograph would take four times its memory.
MOST_ROWS = 1024

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB


def level_photograph(
    model: PanoramicUpright, name: str, path: Path, pixels: Pixels, folder: Path, tags_only: bool
) -> tuple[dict[str, Any], bytes]:
    """Write a level copy of a photograph's file and a preview to ``folder``, unless there is no cue.

    Returns:
        A row of ``levelled.csv``, and the preview.
    """
    estimate = estimate_up(model, pixels)
    row: dict[str, Any] = {"name": name, "expected_error_deg": round(estimate.expected_error_deg, 2)}
    folder.mkdir(parents=True, exist_ok=True)
    if not estimate.is_sure:
        row |= {"became": "left alone: no cue of up", "tilt_deg": "", "notes": ""}
        return row, _preview(pixels, torch.eye(3), f"{name}: no cue of up", folder, name)
    destination = folder / f"{name}{path.suffix}"
    try:
        done = level_file(path, destination, estimate.up, sigma_deg=estimate.expected_error_deg, tags_only=tags_only)
    except InputError as error:  # of the disk, say: what a photograph can have wrong was looked at before the training
        row |= {"became": "not written", "tilt_deg": "", "notes": str(error)}
        return row, _preview(pixels, torch.eye(3), f"{name}: not written", folder, name)
    became = "left alone: level already" if done.skipped else "tags changed" if tags_only else "levelled"
    row |= {"became": became, "file": destination.name, **_columns(done)}
    rotation = torch.eye(3) if done.skipped else done.rotation.float()
    title = f"{name}: tilted by {done.tilt_deg:.1f} degrees, give or take {estimate.expected_error_deg:.1f}"
    return row, _preview(pixels, rotation, title, folder, name)


def level_room(model: PanoramicUpright, name: str, pixels: Pixels, folder: Path) -> tuple[dict[str, Any], bytes]:
    """Write the preview of a held-out room, levelled, to ``folder``; return a row and the preview."""
    folder.mkdir(parents=True, exist_ok=True)
    estimate = estimate_up(model, pixels)
    tilt_deg = float(torch.rad2deg(torch.acos(estimate.up[2].clamp(-1, 1))))
    row = {"name": name, "expected_error_deg": round(estimate.expected_error_deg, 2), "tilt_deg": round(tilt_deg, 2)}
    title = f"{name}: tilted by {tilt_deg:.1f} degrees, give or take {estimate.expected_error_deg:.1f}"
    return row, _preview(pixels, rotation_from_up(estimate.up), title, folder, name)


def level_the_video(model: PanoramicUpright, path: str, run: RunFolder) -> list[str]:
    """Level a video into ``video/``, and return sentences on what became of it."""
    folder = run.path / "video"
    folder.mkdir(exist_ok=True)

    def estimate(image: Tensor) -> tuple[Tensor, float]:
        found = model.predict_up(image)
        return found.up.cpu(), found.expected_error_deg

    rows = model.hparams["image_height"] * (2 if model.hparams["refine_steps"] else 1)
    limit_deg = model.hparams["max_expected_error_deg"]
    source = Path(path)
    destination = folder / f"{source.stem}{'.avi' if source.suffix.lower() == '.avi' else '.mp4'}"
    try:
        done = level_video(source, destination, estimate, max_error_deg=limit_deg, estimate_height_px=rows)
    except InputError as error:
        return [f"{source.name} was not levelled: {error}."]
    counts = {
        "could not be decoded": done.frames_broken,
        "repeat the one before, where the times of the source leave a gap": done.frames_repeated,
        "show no cue of up, and follow their neighbours": done.frames_without_cue,
    }
    told = "; ".join(f"{count} {what}" for what, count in counts.items())
    dropped = [f"Not carried over: {'; '.join(done.dropped)}."] if done.dropped else []
    return [
        f"{done.destination.name}: {len(done.up)} frames at {done.frame_rate_hz:g} a second, of which {told}.",
        *dropped,
        *done.notes,
    ]


def estimate_up(model: PanoramicUpright, pixels: Pixels) -> UpEstimate:
    """Return where up is in a photograph, on the processor."""
    rows = min(MOST_ROWS, len(pixels))
    small = torch.from_numpy(resize_panorama(pixels, rows, 2 * rows)).permute(2, 0, 1).float() / 255
    found = model.predict_up(small)
    return UpEstimate(found.up.cpu(), found.expected_error_deg, found.is_sure)


def _columns(done: LevelledFile) -> dict[str, Any]:
    angles = {"tilt_deg": done.tilt_deg, "yaw_deg": done.yaw_deg, "pitch_deg": done.pitch_deg, "roll_deg": done.roll_deg}
    matrix = {f"r{row}{column}": float(done.rotation[row, column]) for row in range(3) for column in range(3)}
    headings = {"heading_before_deg": done.heading_before_deg, "heading_after_deg": done.heading_after_deg}
    words = {name: "; ".join(getattr(done, name)) for name in ("kept", "dropped", "notes")}
    return {name: round(angle, 3) for name, angle in angles.items()} | headings | words | matrix


def _preview(pixels: Pixels, rotation: Tensor, title: str, folder: Path, name: str) -> bytes:
    """Draw it into a folder of its own, where no photograph's name can meet a preview's."""
    previews = folder / "previews"
    previews.mkdir(parents=True, exist_ok=True)
    rows = min(PREVIEW_ROWS, len(pixels))
    before = resize_panorama(pixels, rows, 2 * rows)
    preview = draw_before_and_after(before, rotate_in_tiles(before, rotation), title)
    with atomic_write(previews / f"{name}.png") as file:
        file.write(preview)
    return preview
