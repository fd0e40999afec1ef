"""What a panorama's file holds beside its pixels: read, and its XMP changed around the old pixels or for new ones.

An XMP packet that cannot be read is dropped and named, and a new one takes its place, so that viewers still know the panorama:
``full_sphere`` are the properties that Photo Sphere requires. ``panorama_encoding`` writes new pixels.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.image_blocks import (
    MAX_SEGMENT_BYTES,
    Block,
    join_jpeg,
    join_png,
    split_jpeg,
    split_png,
    split_webp,
)
from lightning_plugins._support.images import opened_panorama
from lightning_plugins._support.xmp import MAX_PACKET_BYTES, new_packet, read_properties, rewrite

APP0, APP1 = b"\xe0", b"\xe1"
JPEG_EXIF = b"Exif\0\0"
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
JPEG_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
PNG_XMP = b"XML:com.adobe.xmp\0"
TIFF_XMP_TAG = 700
RETAGGED_FORMATS = ("JPEG", "PNG")

_ORIENTATION_TAG = 0x0112
_BITS_TAG = 258


@dataclass
class PanoramaMetadata:
    """What ``read_metadata`` found, and what became of it on the way to the next file.

    Args:
        format: ``JPEG``, ``PNG``, ``TIFF``, ``WEBP`` or ``BMP``.
        mode: of the pixels, as Pillow calls it.
        bits: per channel.
        has_alpha: whether pixels are transparent, by a channel or a colour that stands for it.
        orientation: EXIF's, 1 to 8, or what XMP gives for it.
        properties: the XMP's, as ``xmp.read_properties`` returns them.
        xmp: the packet; None if there is none or it could not be read.
        kept: names of what the next file holds too.
        dropped: names of what it does not, with the reason where it is not the new pixels.
    """

    format: str
    mode: str
    bits: int
    has_alpha: bool
    orientation: int
    properties: dict[str, str]
    xmp: bytes | None
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def is_grey(self) -> bool:
        """Whether the pixels hold no colour."""
        return self.mode in ("1", "L", "LA", "La", "F") or self.mode.startswith("I")

    def keep(self, name: str) -> None:
        """Note once that something was kept."""
        if name not in self.kept:
            self.kept.append(name)

    def drop(self, name: str) -> None:
        """Note once that something was dropped."""
        if name not in self.dropped:
            self.dropped.append(name)


def read_metadata(path: str | Path) -> PanoramaMetadata:
    """Read a panorama's metadata; an XMP packet that cannot be read is named in ``dropped``.

    Raises:
        InputError: as ``read_panorama`` does, save for pixels that cannot be decoded.
    """
    with opened_panorama(path) as image:
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        file = Path(path).read_bytes() if kind in ("JPEG", "PNG", "WEBP") else b""
        # A PNG's bits stand at a fixed place in its header: Pillow reduces them without a word.
        bits = max(image.tag_v2.get(_BITS_TAG, (8,))) if kind == "TIFF" else file[24] if kind == "PNG" else 8
        metadata = PanoramaMetadata(
            format=kind,
            mode=image.mode,
            bits=bits,
            has_alpha=image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
            orientation=image.getexif().get(_ORIENTATION_TAG, 1),
            properties={},
            xmp=_find_xmp(image, kind, file),
        )
    if metadata.xmp is not None:
        try:
            metadata.properties = read_properties(metadata.xmp)
        except InputError as error:
            metadata.drop(f"XMP: {error}")
            metadata.xmp = None
    return metadata


def full_sphere(width: int, height: int) -> dict[str, str]:
    """Return the properties of a level panorama of the whole sphere, without a heading, in pixels and degrees."""
    return {
        "GPano:ProjectionType": "equirectangular",
        "GPano:FullPanoWidthPixels": str(width),
        "GPano:FullPanoHeightPixels": str(height),
        "GPano:CroppedAreaImageWidthPixels": str(width),
        "GPano:CroppedAreaImageHeightPixels": str(height),
        "GPano:CroppedAreaLeftPixels": "0",
        "GPano:CroppedAreaTopPixels": "0",
        "GPano:PosePitchDegrees": "0",
        "GPano:PoseRollDegrees": "0",
    }


def changed_xmp(metadata: PanoramaMetadata, changes: Mapping[str, str | None], width: int, height: int) -> bytes:
    """Return the file's XMP packet with changes, or a new one if it has none that can be changed; ``metadata`` says which.

    Args:
        metadata: as ``read_metadata`` returned them.
        changes: as ``xmp.rewrite`` takes them; ``full_sphere`` is added where the file does not call itself a panorama.
        width: of the image in pixels.
        height: of the image in pixels.
    """
    sphere = {**full_sphere(width, height), **changes}
    if metadata.xmp is not None:
        try:
            packet = rewrite(metadata.xmp, changes if "GPano:ProjectionType" in metadata.properties else sphere)
            if metadata.format == "JPEG" and len(JPEG_XMP + packet) > MAX_SEGMENT_BYTES:
                raise InputError(f"with the pose it has {len(packet)} bytes, more than a segment of a JPEG holds")
        except InputError as error:
            metadata.drop(f"XMP: {error}")
        else:
            metadata.keep("XMP")
            return packet
    return new_packet(sphere)


def check_retagging(path: str | Path, metadata: PanoramaMetadata) -> None:
    """Make sure that a file's tags can be changed around its pixels.

    Raises:
        InputError: if the format is none of ``RETAGGED_FORMATS``.
    """
    if metadata.format not in RETAGGED_FORMATS:
        raise InputError(
            f"the tags of {path}, a {metadata.format}, cannot be changed without encoding its pixels anew; valid are "
            f"{' and '.join(RETAGGED_FORMATS)} files: level the pixels instead, or convert the file first"
        )


def retag_panorama(path: str | Path, metadata: PanoramaMetadata, changes: Mapping[str, str | None]) -> bytes:
    """Return a copy of a JPEG or PNG in which nothing but the XMP differs; the encoded pixels are the same bytes.

    Args:
        path: the file that the metadata were read from.
        metadata: as ``read_metadata`` returned them; says afterwards what was kept and dropped.
        changes: to the XMP, as ``xmp.rewrite`` takes them.

    Raises:
        InputError: as ``check_retagging``.
    """
    check_retagging(path, metadata)
    with opened_panorama(path) as image:
        packet = changed_xmp(metadata, changes, image.width, image.height)
        metadata.keep("all that is not XMP")
        return (_retag_png if metadata.format == "PNG" else _retag_jpeg)(Path(path).read_bytes(), metadata, packet)


def _retag_png(file: bytes, metadata: PanoramaMetadata, packet: bytes) -> bytes:
    chunks = [chunk for chunk in split_png(file) if not is_png_xmp(chunk)]
    first = next(i for i, chunk in enumerate(chunks) if chunk.kind == b"IDAT")
    return join_png([*chunks[:first], png_xmp(packet), *chunks[first:]])


def _retag_jpeg(file: bytes, metadata: PanoramaMetadata, packet: bytes) -> bytes:
    segments, scans = split_jpeg(file)
    # An extension without the packet that names it is of no use.
    old = (JPEG_XMP,) if "XMP" in metadata.kept else (JPEG_XMP, JPEG_EXTENDED_XMP)
    segments = [segment for segment in segments if not (segment.kind == APP1 and segment.data.startswith(old))]
    # Readers look for JFIF and EXIF in the first places.
    first = 0
    while first < len(segments) and (segments[first].kind == APP0 or segments[first].data.startswith(JPEG_EXIF)):
        first += 1
    return join_jpeg([*segments[:first], Block(APP1, JPEG_XMP + packet), *segments[first:]], scans)


def is_png_xmp(chunk: Block) -> bool:
    """Tell whether a PNG's chunk holds XMP."""
    return chunk.kind == b"iTXt" and chunk.data.startswith(PNG_XMP)


def png_xmp(packet: bytes) -> Block:
    """Return the chunk that holds an XMP packet, uncompressed, as the XMP standard asks."""
    return Block(b"iTXt", PNG_XMP + b"\0\0\0\0" + packet)


def _find_xmp(image: Any, kind: str, file: bytes) -> bytes | None:
    if kind == "JPEG":
        found: Iterator[bytes] = (
            s.data[len(JPEG_XMP) :] for s in split_jpeg(file)[0] if s.kind == APP1 and s.data.startswith(JPEG_XMP)
        )
    elif kind == "PNG":
        found = (_text_of_png(chunk.data) for chunk in split_png(file) if is_png_xmp(chunk))
    elif kind == "WEBP":
        found = (chunk.data for chunk in split_webp(file) if chunk.kind == b"XMP ")
    elif kind == "TIFF" and TIFF_XMP_TAG in image.tag_v2:
        value = image.tag_v2[TIFF_XMP_TAG]
        found = iter([value.encode() if isinstance(value, str) else bytes(value)])
    else:
        return None
    return next(found, None)


def _text_of_png(data: bytes) -> bytes:
    """Return the text of an iTXt chunk: keyword, 0, whether compressed, method, language, 0, keyword again, 0, text."""
    rest = data[len(PNG_XMP) :]
    text = rest[2:].split(b"\0", 2)[-1]
    if rest[:1] != b"\1":
        return text
    try:
        # One byte more than is read: what inflates further is too large, however far.
        return zlib.decompressobj().decompress(text, MAX_PACKET_BYTES + 1)
    except zlib.error:
        return b""
