"""The blocks that image files are made of: a JPEG's segments, a PNG's chunks, a WebP's; taken apart and put together unchanged.

Nothing is decoded, and every length is held against what is there; errors do not name the file, which who opened it knows.
``upright_exif`` changes an EXIF block in place, since maker notes hold offsets that only their maker knows: a block that is
written anew loses them.

Sources: ITU-T T.81, appendix B; PNG, third edition, 5; the WebP container specification; EXIF 2.32, 4.6.
"""

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What the length field of a JPEG segment, which counts itself, leaves for data.
MAX_SEGMENT_BYTES = 65533

_START_OF_SCAN = 0xDA
# Markers that stand alone, without a length.
_BARE = (0x01, *range(0xD0, 0xD8))
_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Block:
    """A segment or chunk: its kind (a JPEG's marker as one byte, else four letters) and its data, without length and checksum."""

    kind: bytes
    data: bytes


def split_jpeg(file: bytes) -> tuple[list[Block], bytes]:
    """Return the segments before the first scan, and all bytes from that scan's marker on.

    Raises:
        ValueError: if the file is no JPEG, or ends before a scan.
    """
    if file[:2] != b"\xff\xd8":
        raise ValueError("the file does not start as a JPEG does")
    blocks: list[Block] = []
    at = 2
    while at + 4 <= len(file) and file[at] == 0xFF:
        marker = file[at + 1]
        if marker == 0xFF:  # filling
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker == _START_OF_SCAN:
            return blocks, file[at:]
        else:
            end = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
            blocks.append(Block(file[at + 1 : at + 2], file[at + 4 : end]))
            at = end  # a length below 2 leads back to itself, where no marker is
    raise ValueError(f"the JPEG's segments break off at byte {at}")


def join_jpeg(blocks: Iterable[Block], scans: bytes) -> bytes:
    """Return the file of which ``split_jpeg`` returns these parts."""
    parts = [b"\xff\xd8"]
    for block in blocks:
        parts += [b"\xff", block.kind, (len(block.data) + 2).to_bytes(2, "big"), block.data]
    return b"".join([*parts, scans])


def split_png(file: bytes) -> list[Block]:
    """Return the chunks up to the last, IEND.

    Raises:
        ValueError: if the file is no PNG, or ends before that.
    """
    if file[:8] != PNG_SIGNATURE:
        raise ValueError("the file does not start as a PNG does")
    blocks: list[Block] = []
    at = 8
    while at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4], "big")
        if end + 4 > len(file):
            break
        blocks.append(Block(file[at + 4 : at + 8], file[at + 8 : end]))
        if blocks[-1].kind == b"IEND":
            return blocks
        at = end + 4
    raise ValueError(f"the PNG's chunks break off at byte {at}")


def join_png(blocks: Iterable[Block]) -> bytes:
    """Return the file of which ``split_png`` returns these chunks."""
    parts = [PNG_SIGNATURE]
    for block in blocks:
        checksum = zlib.crc32(block.data, zlib.crc32(block.kind))
        parts += [len(block.data).to_bytes(4, "big"), block.kind, block.data, checksum.to_bytes(4, "big")]
    return b"".join(parts)


def split_webp(file: bytes) -> list[Block]:
    """Return the chunks of a WebP, as far as they are whole; none if the file is another."""
    blocks: list[Block] = []
    at = 12 if file[:4] == b"RIFF" and file[8:12] == b"WEBP" else len(file)
    while at + 8 <= len(file):
        end = at + 8 + int.from_bytes(file[at + 4 : at + 8], "little")
        if end > len(file):
            break
        blocks.append(Block(file[at : at + 4], file[at + 8 : end]))
        at = end + end % 2
    return blocks


def upright_exif(exif: bytes) -> tuple[bytes, bool]:
    """Return an EXIF block whose orientation is 1 and which points to no thumbnail, of the same length; and whether it did.

    Args:
        exif: the TIFF structure, with or without ``Exif\\0\\0`` before it.

    Raises:
        ValueError: if it is damaged.
    """
    start = len(_EXIF_PREFIX) if exif.startswith(_EXIF_PREFIX) else 0
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[start : start + 4])
    if order is None:
        raise ValueError("it does not start as a TIFF structure does")
    block = bytearray(exif)
    try:
        (offset,) = struct.unpack_from(f"{order}I", block, start + 4)
        at = start + offset
        (count,) = struct.unpack_from(f"{order}H", block, at)
        at += 2
        for _ in range(count):
            (tag,) = struct.unpack_from(f"{order}H", block, at)
            if tag == _ORIENTATION_TAG:
                struct.pack_into(f"{order}HHIHH", block, at, tag, 3, 1, 1, 0)
            at += 12
        (thumbnail,) = struct.unpack_from(f"{order}I", block, at)
        struct.pack_into(f"{order}I", block, at, 0)
    except struct.error as error:
        raise ValueError("its first directory is cut off") from error
    return bytes(block), thumbnail != 0
