"""Levelling of a panoramic video: up is estimated in every frame, smoothed over time, and each frame turned by it.

    1. estimate   every frame that can be decoded, at a small height; nothing but the up-vectors is kept
    2. smooth     over the whole video, before and after each frame: ``smooth_up``
    3. rotate     the frames, decoded a second time, by R = rotation_from_up(up) at their own size

A frame that cannot be decoded leaves a gap in the frames' times. The last level frame is repeated there, so that what follows
keeps its time. Where a decoder conceals the damage the frame counts as any other.

A camera that hung upside down has its up near -z, where the smallest rotation turns about the vertical with every small sway.
There the mean up of the video is taken to +z by the smallest rotation, and what remains by another.

OpenCV reads and writes pictures alone: audio, other tracks and 360 metadata are left out, and the result says which there were.
Cost: two decodings, an estimate and a rotation of each frame; some 100 bytes of memory a frame. Speed:
benchmarks/results/upright_speed.csv.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins._support.atomic import atomic_path
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import MIN_HEIGHT_PX
from lightning_plugins._support.video_container import VideoParts, read_video_parts
from lightning_plugins.engines.sphere import resize_equirectangular, rotate_in_tiles, rotation_from_up
from lightning_plugins.engines.sphere.tables import margin_of
from lightning_plugins.models.panoramic_upright.smoothing import smooth_up
from lightning_plugins.models.panoramic_upright.video_frames import CODECS, FrameReader, Image, check_written, open_writer

MAX_SMOOTHING_S = 10.0

# An image (3, H, W), float32 RGB in [0, 1], to its up-vector (3,) and the error it expects in degrees; nan or inf without a cue.
Estimate = Callable[[Tensor], tuple[Tensor, float]]


@dataclass(frozen=True)
class LevelledVideo:
    """What ``level_video`` did.

    Attributes:
        source: the tilted video.
        destination: the file written.
        frame_rate_hz: of both.
        up: ``(N, 3)``, float64: by which each of the N frames written was levelled.
        frames_broken: how many frames of the source could not be decoded.
        frames_repeated: how many of the N stand for those.
        frames_without_cue: how many of the decoded ones did not show where up is, and took it from their neighbours.
        dropped: what the source holds beside its pictures, none of which was copied.
        notes: what else became of the video that its owner may want to know.
    """

    source: Path
    destination: Path
    frame_rate_hz: float
    up: NDArray[np.float64]
    frames_broken: int
    frames_repeated: int
    frames_without_cue: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


@torch.no_grad()
def level_video(
    source: str | Path,
    destination: str | Path,
    estimate: Estimate,
    *,
    smoothing_s: float = 0.5,
    max_error_deg: float = 15.0,
    estimate_height_px: int = 128,
    mode: str = "bicubic",
) -> LevelledVideo:
    """Write a level copy of a panoramic video, of the same size and frame rate.

    Args:
        source: a 360 x 180 degree video, which is not touched: MP4, MOV, AVI, MKV or WEBM.
        destination: the file to write, ``.mp4`` (MPEG-4) or ``.avi`` (Motion JPEG); written whole or not at
            all, over what is there.
        estimate: takes an image ``(3, estimate_height_px, 2 * estimate_height_px)``, float32 RGB in [0, 1], and returns its
            up-vector ``(3,)`` and the error in degrees that it expects, inf if it sees no cue.
        smoothing_s: the width in time of the filter over the up-vectors, at half its height; 0 takes each frame by itself.
        max_error_deg: a frame with a larger expected error has no cue.
        estimate_height_px: the height of the images that are estimated.
        mode: how frames are read between their pixels: ``bicubic``, ``bilinear``, twice as fast, or ``nearest``.

    Raises:
        InputError: if the source is no video, is not 2:1, has no frame that can be decoded, or none with a cue; if the
            destination is the source, has no folder or another suffix, or could not be written whole; or if an option is out of
            its range.
    """
    source, destination = Path(source), Path(destination)
    _check_options(smoothing_s, max_error_deg, estimate_height_px)
    margin_of(mode)  # refuses an unknown one before the work begins
    parts = read_video_parts(source)
    _check_destination(source, destination)
    reader = FrameReader(source, parts)
    # The file is made before the work begins, so that a folder which may not be written is found at once.
    with atomic_path(destination) as temporary:
        found: list[Tensor] = []
        errors_deg: list[float] = []
        missing = torch.full((3,), math.nan, dtype=torch.float64), math.inf
        for gap, image in reader.frames():
            estimates = [missing] * gap
            if image is not None:
                estimates.append(_checked_estimate(*estimate(_small(image, estimate_height_px))))
            found += [up for up, _ in estimates]
            errors_deg += [error_deg for _, error_deg in estimates]
        if not reader.frames_decoded:
            raise InputError(f"{source} holds no frame that can be decoded; give a video that a player shows")
        expected = np.array(errors_deg)
        up = smooth_up(torch.stack(found).numpy(), expected, reader.frame_rate_hz, smoothing_s, max_error_deg)
        _write(temporary, destination, FrameReader(source, parts), _rotations(up), mode)
    silent = int((~(expected <= max_error_deg)).sum()) - reader.frames_repeated
    return LevelledVideo(
        source, destination, reader.frame_rate_hz, up, reader.frames_broken, reader.frames_repeated, silent,
        tuple(_dropped(parts)), tuple(reader.notes),
    )  # fmt: skip


def _small(image: Image, height: int) -> Tensor:
    planes = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))[None].float() / 255
    return resize_equirectangular(planes, height, 2 * height)[0].clamp(0, 1)


def _checked_estimate(up: Tensor, error_deg: float) -> tuple[Tensor, float]:
    up = up.detach().double().cpu()
    length = up.norm()
    if not (0 < length < math.inf):
        return up, math.inf
    return up / length, float(error_deg)


def _rotations(up: NDArray[np.float64]) -> Tensor:
    """Return float32 matrices ``(N, 3, 3)``, level from tilted."""
    vectors = torch.from_numpy(up)
    mean = vectors.mean(dim=0)
    first = rotation_from_up(mean) if mean[2] < 0 else torch.eye(3, dtype=torch.float64)
    return (rotation_from_up(vectors @ first.T) @ first).float()


def _write(temporary: Path, destination: Path, reader: FrameReader, rotations: Tensor, mode: str) -> None:
    writer = open_writer(temporary, destination, reader.frame_rate_hz, reader.height, reader.width)
    count = 0
    level: Image | None = None
    try:
        for gap, image in reader.frames():
            turned = level if image is None else rotate_in_tiles(image, rotations[count + gap], mode)
            # Before the first frame there is none to repeat but itself.
            for picture in [level if level is not None else turned] * gap + [turned] * (image is not None):
                writer.write(picture)
                count += 1
            level = turned
    finally:
        writer.release()
    check_written(temporary, destination, count)


def _check_options(smoothing_s: float, max_error_deg: float, estimate_height_px: int) -> None:
    if not 0 <= smoothing_s <= MAX_SMOOTHING_S:
        raise InputError(f"smoothing_s must be in [0, {MAX_SMOOTHING_S:g}], got {smoothing_s}; 0 takes each frame by itself")
    if not 0 < max_error_deg <= 180:
        raise InputError(f"max_error_deg must be in (0, 180], got {max_error_deg}; 15 is a good limit")
    if estimate_height_px < MIN_HEIGHT_PX:
        raise InputError(f"estimate_height_px must be {MIN_HEIGHT_PX} or more, got {estimate_height_px}; 128 is a good height")


def _check_destination(source: Path, destination: Path) -> None:
    if destination.is_dir():
        raise InputError(f"{destination} is a folder; give the name of the file to write, such as {destination / 'level.mp4'}")
    if not destination.parent.is_dir():
        raise InputError(f"the folder {destination.parent} does not exist; make it, or choose another")
    if destination.suffix.lower() not in CODECS:
        raise InputError(f"{destination} must end in {' or '.join(CODECS)}; such as {destination.with_suffix('.mp4')}")
    if destination.exists() and source.samefile(destination):
        raise InputError(f"{destination} is the source itself, which is never written to; choose another name")


def _dropped(parts: VideoParts) -> Iterator[str]:
    if parts.tracks is None:
        yield "audio and 360 metadata, if it has any: they are looked for in MP4 and MOV alone"
        return
    if audio := parts.tracks.count("soun"):
        yield f"{audio} track{'s' * (audio > 1)} of audio; ffmpeg -i LEVEL -i SOURCE -map 0:v -map 1:a -c copy BOTH adds it again"
    others = [kind for kind in parts.tracks if kind != "soun"]
    if "vide" in others:
        others.remove("vide")
    if others:
        yield f"{len(others)} other track{'s' * (len(others) > 1)} ({', '.join(others)})"
    if parts.is_spherical:
        yield "360 metadata; players take the copy for a flat video until it is tagged as a panorama"
