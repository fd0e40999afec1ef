"""Oracles: Pillow and xml.etree read what was written, from the bytes of the files; hostile packets of every known kind."""

import hashlib
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.image_blocks import split_jpeg
from lightning_plugins._support.panorama_encoding import encode_panorama
from lightning_plugins._support.panorama_metadata import read_metadata, retag_panorama
from lightning_plugins._support.xmp import read_properties, rewrite
from tests.support.panorama_files import (
    GPANO,
    MAKER_NOTE,
    RDF,
    SRGB,
    SUFFIXES,
    exif_block,
    gpano_of,
    insert_segment,
    noise,
    packet,
    write,
    xmp_of,
)

POSE = {"GPano:PosePitchDegrees": "0", "GPano:PoseRollDegrees": "0", "GPano:PoseHeadingDegrees": "77.5"}
AS_ATTRIBUTES = packet(
    'GPano:ProjectionType="equirectangular" GPano:PosePitchDegrees="12.5" GPano:PoseRollDegrees="-3" '
    'dc:rights="&lt;me&gt; &amp; you"'
)
AS_ELEMENTS = packet(
    elements="<GPano:ProjectionType>equirectangular</GPano:ProjectionType><GPano:PosePitchDegrees> 12.5 </GPano:PosePitchDegrees>"
    "<GPano:PoseRollDegrees>-3</GPano:PoseRollDegrees>"
    "<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>Room\r\n</rdf:li></rdf:Alt></dc:title>"
)
TEN_TIMES = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 20))
LAUGHS = f'<!DOCTYPE x [<!ENTITY l0 "ha">{TEN_TIMES}]>'
EXTERNAL = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
HOSTILE = {
    "billion laughs": (LAUGHS.encode() + packet("dc:rights='&l19;'"), "document type or entities"),
    "external entity": (
        EXTERNAL.encode() + packet(elements="<dc:rights>&e;</dc:rights>"),
        "document type or entities",
    ),
    "external document type": (b'<!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd">' + packet(), "document type or entities"),
    "truncated": (AS_ATTRIBUTES[:300], "malformed"),
    "empty": (b" ", "malformed"),
    "not XML": (bytes(range(1, 128)), "malformed"),
    "unbound prefix": (packet("nobody:name='1'"), "malformed"),
    "unknown encoding": (b'<?xml version="1.0" encoding="utf-77"?>' + b"<a/>", "malformed"),
    "nothing described": (b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", "no rdf:Description"),
    "nested": (packet(elements="<dc:a>" * 5000 + "</dc:a>" * 5000), "nested more than 100 deep"),
    "stolen prefix": (packet(f"xmlns:p='{GPANO}' p:PoseRollDegrees='1' xmlns:GPano2=''"), "malformed"),
}  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    """Return a function that encodes a photograph anew, with other pixels and the pose, and returns the copy and its metadata."""

    def encode(path, pixels=None, changes=POSE):
        metadata = read_metadata(path)
        copied = tmp_path / f"copy{path.suffix}"
        copied.write_bytes(encode_panorama(path, metadata, noise(seed=1) if pixels is None else pixels, changes))
        return copied, metadata

    return encode


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("xmp", [AS_ATTRIBUTES, AS_ELEMENTS])
def test_everything_is_kept_and_the_pose_changed_in_place(tmp_path, copy, suffix, xmp):
    path = write(tmp_path / f"room{suffix}", xmp=xmp, exif=exif_block(), icc=SRGB)
    copied, metadata = copy(path)
    assert {"EXIF", "ICC profile", "XMP"} <= set(metadata.kept)
    assert metadata.dropped == []
    with Image.open(copied) as image:
        assert image.format == Image.open(path).format
        assert image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert (exif[0x0110], exif.get(0x0112, 1)) == ("Sphere 1", 1)
        assert exif.get_ifd(0x8769)[0x9286] == b"a comment"
        assert exif.get_ifd(0x8825)[0x0003] == "E"
        if suffix != ".jpg":
            assert np.array_equal(np.asarray(image), noise(seed=1))
    # Pillow hides maker notes, and writes a TIFF's EXIF anew.
    assert MAKER_NOTE in copied.read_bytes() or suffix == ".tif"
    found = gpano_of(copied)
    assert found == {
        "ProjectionType": "equirectangular", "PosePitchDegrees": "0", "PoseRollDegrees": "0", "PoseHeadingDegrees": "77.5",
    }  # fmt: skip
    # In place: what stood as an element still does, and all that is not the pose is as it was.
    before, after = (xmp_of(file) for file in (path, copied))
    assert [node.tag for node in before.iter()] == [node.tag for node in after.iter()]
    others = ("{http://purl.org/dc/elements/1.1/}rights", f"{{{RDF}}}about")
    assert [[n.get(o) for o in others] for n in before.iter()] == [[n.get(o) for o in others] for n in after.iter()]
    assert [n.text for n in before.iter() if "Pose" not in n.tag] == [n.text for n in after.iter() if "Pose" not in n.tag]
    assert b"<!-- by a test -->" in copied.read_bytes()
    assert b'<?xpacket begin="\xef\xbb\xbf"' in copied.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_photograph_without_xmp_becomes_known_as_a_panorama(tmp_path, copy, suffix):
    copied, metadata = copy(write(tmp_path / f"room{suffix}"), changes={"GPano:PoseHeadingDegrees": None})
    assert gpano_of(copied) == {
        "ProjectionType": "equirectangular", "PosePitchDegrees": "0", "PoseRollDegrees": "0",
        "FullPanoWidthPixels": "64", "FullPanoHeightPixels": "32", "CroppedAreaLeftPixels": "0", "CroppedAreaTopPixels": "0",
        "CroppedAreaImageWidthPixels": "64", "CroppedAreaImageHeightPixels": "32",
    }  # fmt: skip
    assert (metadata.kept, metadata.dropped) == ([], [])


def test_xmp_without_a_panorama_gets_one_and_keeps_the_rest(tmp_path, copy):
    copied, metadata = copy(write(tmp_path / "room.png", xmp=packet("dc:rights='me'")))
    assert gpano_of(copied)["ProjectionType"] == "equirectangular"
    assert gpano_of(copied)["PoseHeadingDegrees"] == "77.5"
    assert b'dc:rights="me"' in copied.read_bytes()
    assert metadata.kept == ["XMP"]


def test_only_the_photographs_own_properties_are_read_and_changed():
    other = (
        "<dc:source rdf:parseType='Resource'><GPano:PosePitchDegrees>5</GPano:PosePitchDegrees></dc:source>"
        "<dc:x><rdf:RDF><rdf:Description GPano:PosePitchDegrees='6'/></rdf:RDF></dc:x>"
    )
    xmp = packet("GPano:PoseRollDegrees='1'", other)
    assert read_properties(xmp) == {"GPano:PoseRollDegrees": "1"}
    after = rewrite(xmp, {"GPano:PosePitchDegrees": "0", "GPano:PoseRollDegrees": "0"})
    assert read_properties(after) == {"GPano:PoseRollDegrees": "0", "GPano:PosePitchDegrees": "0"}
    assert b">5<" in after
    assert b'"6"' in after


def test_a_property_that_stands_twice_is_changed_twice_and_taken_out_twice():
    second = f"<rdf:Description rdf:about='' xmlns:g='{GPANO}'><g:PoseRollDegrees>2</g:PoseRollDegrees></rdf:Description>"
    xmp = packet("GPano:PoseRollDegrees='1'").replace(b"</rdf:RDF>", second.encode() + b"</rdf:RDF>")
    after = rewrite(xmp, {"GPano:PoseRollDegrees": "0"})
    assert b'GPano:PoseRollDegrees="0"' in after
    assert b"<g:PoseRollDegrees>0<" in after
    assert b"PoseRollDegrees" not in rewrite(xmp, {"GPano:PoseRollDegrees": None})


def test_line_ends_and_tabs_in_values_survive():
    after = rewrite(packet("dc:rights='a&#xA;b&#9;c'", "<dc:title>a&#xD;b</dc:title>"), POSE)
    assert b"a&#10;b&#9;c" in after
    assert b"a&#13;b" in after


def test_a_prefix_that_means_something_else_is_not_overridden():
    xmp = packet().replace(GPANO.encode(), b"urn:other")
    xmp = xmp.replace(b"rdf:about", b"GPano:mine='1' rdf:about")
    with pytest.raises(InputError, match="uses the prefix GPano for something else"):
        rewrite(xmp, POSE)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_malformed_packets_are_replaced_and_named(tmp_path, copy, monkeypatch, suffix, name):
    xmp, reason = HOSTILE[name]
    path = write(tmp_path / f"room{suffix}", xmp=xmp, exif=exif_block())
    opened = []
    monkeypatch.setattr("builtins.open", lambda file, *args, real=open, **kw: opened.append(str(file)) or real(file, *args, **kw))
    started = time.monotonic()
    copied, metadata = copy(path)
    assert time.monotonic() - started < 5
    assert not [file for file in opened if "passwd" in file]
    (dropped,) = metadata.dropped
    assert dropped.startswith("XMP: ")
    assert reason in dropped
    assert "XMP" not in metadata.kept
    assert gpano_of(copied)["PoseHeadingDegrees"] == "77.5"
    with Image.open(copied) as image:
        assert image.getexif()[0x0110] == "Sphere 1"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_20_megabytes_are_not_parsed(tmp_path, copy, suffix):
    path = write(tmp_path / f"room{suffix}", xmp=packet(f"dc:rights='{'x' * 20_000_000}'"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    copied, metadata = copy(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert "bytes, and no more than 1048576 are read" in metadata.dropped[0]
    assert copied.stat().st_size < 30_000


def png_with_compressed_xmp(path, text):
    data = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text)
    chunk = len(data).to_bytes(4, "big") + b"iTXt" + data + zlib.crc32(b"iTXt" + data).to_bytes(4, "big")
    file = write(path).read_bytes()
    path.write_bytes(file[:33] + chunk + file[33:])
    return path


def test_compressed_xmp_is_read_and_a_bomb_is_not(tmp_path, copy):
    path = png_with_compressed_xmp(tmp_path / "room.png", AS_ATTRIBUTES)
    assert read_metadata(path).properties["GPano:PosePitchDegrees"] == "12.5"
    copied, metadata = copy(path)
    assert gpano_of(copied)["PosePitchDegrees"] == "0"
    assert metadata.kept == ["XMP"]
    # Pillow itself takes none that inflates beyond a megabyte.
    with pytest.raises(InputError, match=r"room.png cannot be decoded"):
        read_metadata(png_with_compressed_xmp(path, b" " * 100_000_000))


def test_extended_xmp_and_the_second_picture_are_dropped_with_the_old_pixels_and_kept_with_the_old_tags(tmp_path, copy):
    guid = hashlib.md5(b"depth map").hexdigest().upper()
    xmp = packet(f'xmlns:xmpNote="http://ns.adobe.com/xmp/note/" xmpNote:HasExtendedXMP="{guid}" GPano:PoseRollDegrees="1"')
    path = write(tmp_path / "room.jpg", xmp=xmp)
    insert_segment(path, 0xE7, b"maker\0" + bytes(100))
    insert_segment(path, 0xE1, b"http://ns.adobe.com/xmp/extension/\0" + guid.encode() + bytes(8) + b"<depth/>")
    copied, metadata = copy(path)
    assert metadata.dropped == ["extended XMP", "APP7 segment maker"]
    assert b"HasExtendedXMP" not in copied.read_bytes()
    assert b"xmp/extension" not in copied.read_bytes()
    retagged = retag_panorama(path, read_metadata(path), POSE)
    assert guid.encode() + bytes(8) + b"<depth/>" in retagged
    assert f'HasExtendedXMP="{guid}"'.encode() in retagged
    assert b"maker\0" in retagged


def test_a_packet_that_no_longer_fits_into_a_segment_is_replaced(tmp_path, copy):
    path = write(tmp_path / "room.jpg", xmp=packet(f"dc:rights='{'x' * 64900}'"))
    copied, metadata = copy(path)
    assert metadata.dropped[0].endswith("more than a segment of a JPEG holds")
    assert gpano_of(copied)["PoseHeadingDegrees"] == "77.5"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_orientation_is_reset_in_exif_and_xmp(tmp_path, copy, suffix, order):
    exif = exif_block(orientation=3)
    exif.endian = order
    path = write(
        tmp_path / f"room{suffix}", exif=exif, xmp=packet('xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"')
    )
    assert read_metadata(path).orientation == 3
    copied, metadata = copy(path)
    with Image.open(copied) as image:
        assert image.getexif().get(0x0112, 1) == 1
    assert b'tiff:Orientation="1"' in copied.read_bytes()
    assert metadata.dropped == []


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_thumbnail_of_the_old_pixels_is_unlinked_and_nothing_else_of_exif_moves(tmp_path, copy, order):
    # Orientation 6 and a model in the first directory, one entry in the second; the model's offset points beyond both.
    first = struct.pack(f"{order}H HHIHH HHII I", 2, 0x0112, 3, 1, 6, 0, 0x0110, 2, 9, 56, 38)
    second = struct.pack(f"{order}H HHIHH I", 1, 0x0103, 3, 1, 6, 0, 0)
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + first + second + b"Sphere 1\0"
    path = write(tmp_path / "room.jpg", np.ascontiguousarray(noise().transpose(1, 0, 2)))
    insert_segment(path, 0xE1, b"Exif\0\0" + block)
    copied, metadata = copy(path)
    assert metadata.dropped == ["EXIF's thumbnail"]
    expected = bytearray(block)
    expected[10:22] = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 1, 0)
    expected[34:38] = bytes(4)
    assert b"Exif\0\0" + expected in copied.read_bytes()
    with Image.open(copied) as image:
        assert dict(image.getexif()) == {0x0112: 1, 0x0110: "Sphere 1"}


def test_damaged_exif_is_dropped_and_named(tmp_path, copy):
    path = write(tmp_path / "room.jpg")
    insert_segment(path, 0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(30))
    _, metadata = copy(path)
    assert metadata.dropped == ["EXIF: its first directory is cut off"]


def test_a_profile_of_other_colours_is_dropped(tmp_path, copy):
    path = tmp_path / "room.jpg"
    cmyk = SRGB[:16] + b"CMYK" + SRGB[20:]
    Image.fromarray(noise()).convert("CMYK").save(path, icc_profile=cmyk)
    copied, metadata = copy(path)
    assert metadata.dropped == ["ICC profile: it is for CMYK and not for RGB pixels"]
    with Image.open(copied) as image:
        assert image.mode == "RGB"
        assert "icc_profile" not in image.info


def test_a_jpegs_tables_sampling_comment_and_iptc_are_kept(tmp_path, copy):
    path = tmp_path / "room.jpg"
    Image.fromarray(noise()).save(path, quality=83, subsampling=1, comment="hello")
    insert_segment(path, 0xED, b"Photoshop 3.0\x008BIM")
    copied, metadata = copy(path)
    with Image.open(path) as before, Image.open(copied) as after:
        assert after.quantization == before.quantization
        assert [layer[1:3] for layer in after.layer] == [layer[1:3] for layer in before.layer]
        assert after.info["comment"] == b"hello"
    assert b"Photoshop 3.0\x008BIM" in copied.read_bytes()
    assert sorted(metadata.kept) == ["IPTC", "comment"]


def test_a_pngs_texts_and_colour_are_kept_and_its_animation_is_not(tmp_path, copy):
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a room")
    info.add_text("Raw profile type xmp", "old")
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    info.add(b"prVt", b"1")
    path = tmp_path / "room.png"
    Image.fromarray(noise()).save(path, pnginfo=info, dpi=(300, 300))
    copied, metadata = copy(path)
    with Image.open(copied) as image:
        assert image.text["Title"] == "a room"
        assert "Raw profile type xmp" not in image.text
        assert image.info["gamma"] == pytest.approx(0.45455)
        assert image.info["dpi"][0] == pytest.approx(300, abs=1)
    assert set(metadata.kept) == {"texts", "colour", "resolution"}
    assert set(metadata.dropped) == {"PNG chunk tEXt", "PNG chunk prVt"}


@pytest.mark.parametrize(("given", "expected"), [("tiff_lzw", "tiff_lzw"), ("raw", "raw"), ("jpeg", "tiff_lzw")])
def test_a_tiffs_lossless_compression_and_descriptions_are_kept(tmp_path, copy, given, expected):
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[65000] = "a room", "private"
    path = tmp_path / "room.tif"
    Image.fromarray(noise()).save(path, compression=given, tiffinfo=tags, dpi=(300, 300))
    copied, metadata = copy(path)
    with Image.open(copied) as image:
        assert image.info["compression"] == expected
        assert image.tag_v2[270] == "a room"
        assert image.info["dpi"] == (300, 300)
        assert np.array_equal(np.asarray(image), noise(seed=1))
    assert metadata.dropped == ["TIFF tag 65000"]


def test_lossy_webp_stays_lossy_and_a_bmp_says_what_it_lacks(tmp_path, copy):
    path = tmp_path / "room.webp"
    Image.fromarray(noise()).save(path, quality=80)
    copied, _ = copy(path)
    assert b"VP8 " in copied.read_bytes()
    path = write(tmp_path / "room.bmp")
    copied, metadata = copy(path)
    assert metadata.dropped == ["the pose: a BMP has no place for it"]
    assert np.array_equal(np.asarray(Image.open(copied)), noise(seed=1))


@pytest.mark.parametrize("length", [b"\0\1", b"\xff\xff"])
def test_a_segment_whose_length_is_wrong_ends_the_file(length):
    with pytest.raises(ValueError, match="segments break off at byte"):
        split_jpeg(b"\xff\xd8\xff\xe5" + length + b"\xff\xda\0\2")


def test_a_webps_xmp_is_found_behind_a_chunk_of_odd_length(tmp_path, copy):
    path = write(tmp_path / "room.webp", xmp=AS_ATTRIBUTES)
    file = path.read_bytes()
    at = file.index(b"XMP ")
    odd = b"maKR" + (3).to_bytes(4, "little") + b"odd" + b"\0"
    path.write_bytes(file[:4] + (len(file) + len(odd) - 8).to_bytes(4, "little") + file[8:at] + odd + file[at:])
    _, metadata = copy(path)
    assert metadata.kept == ["XMP"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("xmp", [None, AS_ATTRIBUTES, AS_ELEMENTS, HOSTILE["truncated"][0]])
def test_new_tags_leave_every_other_byte(tmp_path, suffix, xmp):
    path = write(tmp_path / f"room{suffix}", xmp=xmp, exif=exif_block(), icc=SRGB)
    plain = write(tmp_path / f"plain{suffix}", exif=exif_block(), icc=SRGB).read_bytes()
    metadata = read_metadata(path)
    tagged = tmp_path / f"tagged{suffix}"
    tagged.write_bytes(retag_panorama(path, metadata, POSE))
    assert gpano_of(tagged)["PoseHeadingDegrees"] == "77.5"
    # Without the one block that holds the XMP it is the photograph that never had any.
    file = tagged.read_bytes()
    start = file.index(b"http://ns.adobe.com/xap/1.0/\0") - 4 if suffix == ".jpg" else file.index(b"XML:com.adobe.xmp\0") - 8
    size = (
        int.from_bytes(file[start + 2 : start + 4], "big") + 2
        if suffix == ".jpg"
        else int.from_bytes(file[start : start + 4], "big") + 12
    )
    assert file[:start] + file[start + size :] == plain
    assert np.array_equal(np.asarray(Image.open(tagged)), np.asarray(Image.open(path)))
    assert len(metadata.dropped) == (xmp == HOSTILE["truncated"][0])


@pytest.mark.parametrize("suffix", [".tif", ".webp", ".bmp"])
def test_formats_whose_tags_cannot_be_changed_alone_are_refused_by_name(tmp_path, suffix):
    path = write(tmp_path / f"room{suffix}")
    with pytest.raises(InputError, match=r"room\..* a (TIFF|WEBP|BMP), cannot be changed .* valid are JPEG and PNG"):
        retag_panorama(path, read_metadata(path), POSE)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_break_off_or_are_garbled_are_refused_or_read_but_never_crash(tmp_path, suffix):
    whole = write(tmp_path / f"room{suffix}", xmp=AS_ATTRIBUTES, exif=exif_block(), icc=SRGB).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / f"broken{suffix}"
    sentences = []
    for trial in range(60):
        garbled = bytearray(whole)
        if trial % 2:
            garbled = garbled[: random.integers(1, len(whole))]
        else:
            for at in random.integers(0, min(len(whole), 4000), 20):
                garbled[at] = random.integers(256)
        path.write_bytes(garbled)
        try:
            metadata = read_metadata(path)
            encode_panorama(path, metadata, noise(), POSE)
            if suffix in (".jpg", ".png"):
                retag_panorama(path, read_metadata(path), POSE)
        except InputError as error:
            sentences.append(str(error))
    assert sentences
    assert all("broken" in sentence for sentence in sentences)
