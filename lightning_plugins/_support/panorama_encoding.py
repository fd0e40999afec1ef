"""New pixels for a panorama's file: in the format of the old one, with what it held beside its pixels.

    JPEG    keeps EXIF, ICC profile, XMP, IPTC and comments; its quantisation tables and chroma sampling, or quality 95
    PNG     keeps EXIF, ICC profile and the other chunks of colour, XMP, texts, resolution and time
    TIFF    keeps EXIF (Pillow writes it anew), ICC profile, XMP, IPTC, resolution, descriptions; lossless compression, else LZW
    WEBP    keeps EXIF, ICC profile and XMP; lossless stays lossless, else quality 95
    BMP     holds none of these

What belongs to the old pixels goes with them and is named: EXIF's thumbnail, further pictures in the file, makers' own blocks,
and a JPEG's extended XMP, which holds such things as depth maps and the second eye's picture.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.image_blocks import Block, join_jpeg, join_png, split_jpeg, split_png, split_webp, upright_exif
from lightning_plugins._support.images import opened_panorama
from lightning_plugins._support.optional import require
from lightning_plugins._support.panorama_metadata import (
    APP0,
    APP1,
    JPEG_EXIF,
    JPEG_EXTENDED_XMP,
    JPEG_XMP,
    TIFF_XMP_TAG,
    PanoramaMetadata,
    changed_xmp,
    is_png_xmp,
    png_xmp,
)

QUALITY = 95

_APP2, _APP13, _APP14, _COMMENT = b"\xe2", b"\xed", b"\xee", b"\xfe"
_PNG_KEPT = {
    **dict.fromkeys((b"cICP", b"gAMA", b"cHRM", b"sRGB"), "colour"),
    **dict.fromkeys((b"tEXt", b"zTXt", b"iTXt"), "texts"),
    b"pHYs": "resolution",
    b"tIME": "time",
}
# What says how the old pixels are stored, and the profile, which is written with the new ones.
_PNG_STRUCTURE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"bKGD", b"hIST", b"sBIT", b"iCCP")
# Names, descriptions, dates, resolution, IPTC, Photoshop's, and the directories of EXIF and GPS.
_TIFF_KEPT = (269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 33432, 33723, 34377, 34665, 34853)
_TIFF_REPLACED = (TIFF_XMP_TAG, 34675)
_TIFF_LOSSLESS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits")
# The colour space in an ICC profile's header -> the mode of the pixels it is for.
_ICC_MODES = {b"RGB ": "RGB", b"GRAY": "L"}


def encode_panorama(
    path: str | Path, metadata: PanoramaMetadata, pixels: NDArray[np.uint8], changes: Mapping[str, str | None]
) -> bytes:
    """Return a file like the one at ``path``, but with other pixels, upright, and with changes to the XMP.

    Args:
        path: the file that the metadata were read from.
        metadata: as ``read_metadata`` returned them; says afterwards what was kept and dropped.
        pixels: ``(H, W, 3)``, or ``(H, W, 1)`` for grey.
        changes: as ``xmp.rewrite`` takes them.

    Raises:
        InputError: as ``read_panorama`` does.
    """
    height, width, channels = pixels.shape
    picture = require("PIL.Image").fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    changes = {**changes, "xmpNote:HasExtendedXMP": None}
    if "tiff:Orientation" in metadata.properties:
        changes["tiff:Orientation"] = "1"
    packet = changed_xmp(metadata, changes, width, height)
    with opened_panorama(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            metadata.drop("the file's further pictures")
        icc = _kept_icc(metadata, image, picture)
        if metadata.format == "JPEG":
            return _encode_jpeg(Path(path).read_bytes(), metadata, image, picture, icc, packet)
        if metadata.format == "PNG":
            return _encode_png(Path(path).read_bytes(), metadata, picture, icc, packet)
        if metadata.format == "TIFF":
            return _encode_tiff(metadata, image, picture, icc, packet)
        if metadata.format == "WEBP":
            lossless = any(chunk.kind == b"VP8L" for chunk in split_webp(Path(path).read_bytes()))
            exif = _kept_exif(metadata, image.info.get("exif"))
            return _saved(picture, "WEBP", lossless=lossless, quality=QUALITY, exif=exif, icc_profile=icc, xmp=packet)
        metadata.drop("the pose: a BMP has no place for it")
        return _saved(picture, "BMP")


def _encode_jpeg(file: bytes, metadata: PanoramaMetadata, image: Any, picture: Any, icc: bytes | None, packet: bytes) -> bytes:
    options: dict[str, Any] = {"quality": QUALITY, "subsampling": 0}
    if image.mode == picture.mode:
        sampling = require("PIL.JpegImagePlugin").get_sampling(image)
        if picture.mode == "L" or sampling >= 0:
            options = {"qtables": image.quantization, "subsampling": sampling}
    new, scans = split_jpeg(_saved(picture, "JPEG", icc_profile=icc, **options))
    carried = []
    for segment in split_jpeg(file)[0]:
        if segment.kind == APP1 and segment.data.startswith(JPEG_EXIF):
            carried += [Block(APP1, exif) for exif in [_kept_exif(metadata, segment.data)] if exif]
        elif segment.kind == _APP13 or segment.kind == _COMMENT:
            metadata.keep("IPTC" if segment.kind == _APP13 else "comment")
            carried.append(segment)
        elif segment.kind == APP1 and segment.data.startswith(JPEG_EXTENDED_XMP):
            metadata.drop("extended XMP")
        elif not _is_written_anew(segment):
            name = segment.data.split(b"\0")[0][:40].decode("ascii", "replace")
            metadata.drop(f"APP{segment.kind[0] - APP0[0]} segment {name}")
    # The encoder's first is JFIF's, which stands before all others; EXIF comes next, then XMP.
    first = 1 if new[0].kind == APP0 else 0
    exif = [segment for segment in carried if segment.kind == APP1]
    others = [segment for segment in carried if segment.kind != APP1]
    return join_jpeg([*new[:first], *exif, Block(APP1, JPEG_XMP + packet), *others, *new[first:]], scans)


def _is_written_anew(segment: Block) -> bool:
    """Tell whether the encoder makes its own of it: tables, sizes, JFIF, Adobe's colour transform, the profile and the XMP."""
    if segment.kind == APP1:
        return segment.data.startswith(JPEG_XMP)
    if segment.kind == _APP2:
        return segment.data.startswith(b"ICC_PROFILE\0")
    return segment.kind in (APP0, _APP14) or not APP0 <= segment.kind <= b"\xef"


def _encode_png(file: bytes, metadata: PanoramaMetadata, picture: Any, icc: bytes | None, packet: bytes) -> bytes:
    header, *new = split_png(_saved(picture, "PNG", icc_profile=icc))
    carried = [png_xmp(packet)]
    for chunk in split_png(file):
        if is_png_xmp(chunk) or chunk.kind in _PNG_STRUCTURE:
            continue
        # Another program's wrapping of the same metadata: they would say again what has changed.
        if chunk.kind in _PNG_KEPT and not chunk.data.startswith(b"Raw profile type"):
            metadata.keep(_PNG_KEPT[chunk.kind])
            carried.append(chunk)
        elif chunk.kind == b"eXIf":
            carried += [Block(b"eXIf", exif) for exif in [_kept_exif(metadata, chunk.data)] if exif]
        else:
            metadata.drop(f"PNG chunk {chunk.kind.decode('ascii', 'replace')}")
    return join_png([header, *carried, *new])


def _encode_tiff(metadata: PanoramaMetadata, image: Any, picture: Any, icc: bytes | None, packet: bytes) -> bytes:
    tags = image.getexif()
    for tag in [tag for tag in tags if tag not in _TIFF_KEPT]:
        # Those below are TIFF's own, on how the old pixels are stored.
        if tag >= 32768 and tag not in _TIFF_REPLACED:
            metadata.drop(f"TIFF tag {tag}")
        del tags[tag]
    if len(tags):
        metadata.keep("EXIF")
    tags[TIFF_XMP_TAG] = packet
    compression = image.info.get("compression")
    return _saved(
        picture, "TIFF", exif=tags, icc_profile=icc, compression=compression if compression in _TIFF_LOSSLESS else "tiff_lzw"
    )


def _kept_exif(metadata: PanoramaMetadata, exif: bytes | None) -> bytes:
    if not exif:
        return b""
    try:
        upright, had_thumbnail = upright_exif(exif)
    except ValueError as error:
        metadata.drop(f"EXIF: {error}")
        return b""
    metadata.keep("EXIF")
    if had_thumbnail:
        metadata.drop("EXIF's thumbnail")
    return upright


def _kept_icc(metadata: PanoramaMetadata, image: Any, picture: Any) -> bytes | None:
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    if _ICC_MODES.get(icc[16:20]) != picture.mode:
        metadata.drop(f"ICC profile: it is for {icc[16:20].decode('ascii', 'replace').strip()} and not for {picture.mode} pixels")
        return None
    metadata.keep("ICC profile")
    return bytes(icc)


def _saved(picture: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
