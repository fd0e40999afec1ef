"""What a video's file holds beside its pictures, told by its structure alone: nothing is decoded, and no content is held.

MP4 and MOV are boxes within boxes, each a size of 32 bits, or of 64 where that is 1, a type of four letters, and its content. A
track is moov/trak: its kind stands in mdia/hdlr, 360 metadata in a uuid box of the track (version 1) or as sv3d within its
sample description (version 2). Of other containers only the kind is told.

Sources: ISO/IEC 14496-12; Spherical Video RFC, versions 1 and 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lightning_plugins._support.errors import InputError

# Parent -> bytes of its own before the boxes in it. The boxes within stsd are sample descriptions of any type.
_PARENTS = {b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0, b"stsd": 8}
_PICTURE_DESCRIPTION_BYTES = 78
_SPHERICAL_UUID = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")
_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
# A film of hours has some hundred boxes outside its data, and fragments a few thousand; a hostile file could have millions.
MAX_BOXES = 20_000
MAX_DEPTH = 8


@dataclass(frozen=True)
class VideoParts:
    """The parts of a video's file.

    Attributes:
        container: ``mp4`` (with MOV), ``avi`` or ``matroska`` (with WebM).
        tracks: the kinds of an MP4's tracks, such as ``vide`` and ``soun``; None for other containers.
        is_spherical: whether an MP4 is tagged as a 360-degree video; None for other containers.
    """

    container: str
    tracks: tuple[str, ...] | None = None
    is_spherical: bool | None = None


def read_video_parts(path: str | Path) -> VideoParts:
    """Tell what a video's file holds.

    Raises:
        InputError: if there is no such file, or it is none of these containers. A playlist, which would lead a decoder to other
            files, is none.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file; give a video in MP4, MOV, AVI, MKV or WEBM")
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _FIRST_BOXES:
            return _mp4_parts(file, path.stat().st_size)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return VideoParts("avi")
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return VideoParts("matroska")
    raise InputError(f"{path} is no video that can be read; convert it to MP4, MOV, AVI, MKV or WEBM")


def _mp4_parts(file: IO[bytes], size: int) -> VideoParts:
    tracks = []
    is_spherical = False
    for kind, parent, start in _boxes(file, 0, size, iter(range(MAX_BOXES))):
        if kind == b"hdlr" and parent == b"mdia":
            file.seek(start + 8)
            tracks.append(file.read(4).decode("latin-1"))
        elif kind == b"uuid" and parent == b"trak":
            file.seek(start)
            is_spherical |= file.read(16) == _SPHERICAL_UUID
        is_spherical |= kind == b"sv3d"
    return VideoParts("mp4", tuple(tracks), is_spherical)


def _boxes(
    file: IO[bytes], start: int, end: int, budget: Iterator[int], parent: bytes = b"", depth: int = 0
) -> Iterator[tuple[bytes, bytes, int]]:
    """Yield the type of each box, its parent's, and where its content begins; of a damaged file what comes before the damage."""
    while start + 8 <= end and depth < MAX_DEPTH and next(budget, None) is not None:
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:
            size, content = int.from_bytes(head[8:], "big"), start + 16
        elif size == 0:
            size = end - start
        after = start + size
        if not content <= after <= end:
            return
        yield kind, parent, content
        own_bytes = _PICTURE_DESCRIPTION_BYTES if parent == b"stsd" else _PARENTS.get(kind)
        if own_bytes is not None:
            yield from _boxes(file, content + own_bytes, after, budget, kind, depth + 1)
        start = after
