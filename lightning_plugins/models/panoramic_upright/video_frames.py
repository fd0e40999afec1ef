"""The frames of a panoramic video, read and written by OpenCV's FFmpeg: what is broken is counted, what is not whole is found.

FFmpeg gives each frame that it can decode its time. A frame that is missing shows as a gap in these times, or, at the end, in
the number of frames that the file's head declares.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import MAX_PIXELS, MIN_HEIGHT_PX, RATIO_TOLERANCE
from lightning_plugins._support.optional import require
from lightning_plugins._support.video_container import VideoParts

CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
# Beyond it the frames that are missing are not waited for, nor their time filled: it could be a damaged clock.
MAX_GAP_S = 10.0
MAX_FRAME_RATE_HZ = 240.0

Image = NDArray[np.uint8]


class FrameReader:
    """A video that is read from its beginning to its end, once.

    Args:
        path: the file.
        parts: what ``read_video_parts`` said of it.

    Attributes:
        frames_decoded, frames_broken, frames_repeated: what there was so far; broken ones are known when a good one follows.
        notes: what its owner may want to know.

    Raises:
        InputError: if it cannot be opened, has no usable frame rate, or is no panorama.
    """

    def __init__(self, path: Path, parts: VideoParts) -> None:
        # Damage is counted and reported; FFmpeg would write lines on end about it. It asks for this once, when it is first used.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        cv2 = require("cv2")
        self.capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        if not self.capture.isOpened():
            raise InputError(f"{path} is no video that can be read, or is cut off; give one that a player shows")
        self.time_property = cv2.CAP_PROP_POS_MSEC
        self.frame_rate_hz = float(self.capture.get(cv2.CAP_PROP_FPS))
        if not 1 <= self.frame_rate_hz <= MAX_FRAME_RATE_HZ:
            raise InputError(
                f"{path} has {self.frame_rate_hz:g} frames a second; "
                f"valid is 1 to {MAX_FRAME_RATE_HZ:g}: convert it to a constant rate"
            )
        self.width = int(self.capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(self.capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        _check_size(path, self.height, self.width)
        # Matroska has no count of its frames, and OpenCV gives its length times its rate.
        self.declared = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)) if parts.container != "matroska" else 0
        self.frames_decoded = self.frames_broken = self.frames_repeated = 0
        self.notes: list[str] = []

    def frames(self) -> Iterator[tuple[int, Image | None]]:
        """Yield each frame ``(height, width, 3)``, BGR, with the number of those that are missing before it; at the end None."""
        longest = round(MAX_GAP_S * self.frame_rate_hz)
        failures = 0
        while failures <= longest:
            decoded, image = self.capture.read()
            if not decoded:
                failures += 1
                continue
            # Frames may come a little off their time without one being missing.
            late = self.capture.get(self.time_property) / 1000 * self.frame_rate_hz - self._frames()
            gap = self._cut(math.floor(late + 0.25), longest)
            self.frames_broken += failures
            self.frames_repeated += gap
            failures = 0
            yield gap, image
            self.frames_decoded += 1
        gap = self._cut(self.declared - self._frames(), longest) if self.frames_decoded else 0
        self.frames_broken += gap
        self.frames_repeated += gap
        yield gap, None

    def _frames(self) -> int:
        return self.frames_decoded + self.frames_repeated

    def _cut(self, gap: int, longest: int) -> int:
        if gap > longest:
            self.notes.append(
                f"{gap} frames are missing after {self._frames() / self.frame_rate_hz:.1f} s, and only {longest} were filled"
            )
        return min(max(gap, 0), longest)


def open_writer(temporary: Path, destination: Path, frame_rate_hz: float, height: int, width: int) -> Any:
    """Open OpenCV's writer on a temporary file that will become ``destination``.

    Raises:
        InputError: if it cannot write such a video.
    """
    cv2 = require("cv2")
    codec = cv2.VideoWriter.fourcc(*CODECS[destination.suffix.lower()])
    writer = cv2.VideoWriter(str(temporary), cv2.CAP_FFMPEG, codec, frame_rate_hz, (width, height))
    if not writer.isOpened():
        raise InputError(
            f"OpenCV cannot write {destination} at {width} x {height}; free space, or try another suffix: .mp4, .avi"
        )
    return writer


def check_written(temporary: Path, destination: Path, count: int) -> None:
    """Make sure that ``count`` frames have arrived, without decoding them: the writer is silent when the disk is full.

    Raises:
        InputError: if they have not.
    """
    cv2 = require("cv2")
    capture = cv2.VideoCapture(str(temporary), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
    arrived = 0
    while arrived <= count and capture.grab():
        arrived += 1
    capture.release()
    with temporary.open("rb") as file:
        head = file.read(8)
    # The last frame of an AVI may be there in part; its head gives the length that it should have, or less in a large file.
    is_cut = head[:4] == b"RIFF" and int.from_bytes(head[4:], "little") + 8 > temporary.stat().st_size
    if arrived != count or is_cut:
        raise InputError(
            f"{destination} could not be written whole: {arrived} of {count} frames arrived; "
            f"free space there, or choose another place"
        )


def _check_size(path: Path, height: int, width: int) -> None:
    if height * width > MAX_PIXELS or height < MIN_HEIGHT_PX:
        raise InputError(
            f"{path} is {width} x {height} pixels; valid are {MIN_HEIGHT_PX} rows or more and "
            f"{MAX_PIXELS} pixels or fewer: resize it"
        )
    if abs(width - 2 * height) > RATIO_TOLERANCE * width or width % 2 or height % 2:
        raise InputError(
            f"{path} is {width} x {height} pixels, and a 360 x 180 degree video is 2:1 with even sides; "
            f"stitch it, or crop its borders"
        )
