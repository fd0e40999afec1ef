"""Boxes written here by hand, good and hostile, and what OpenCV writes."""

import struct
import time

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.video_container import VideoParts, read_video_parts
from tests.support.video_boxes import box, track

SPHERICAL_V1 = bytes.fromhex("ffcc8263f8554a938814587a02521fdd")


def large_box(kind, content=b""):
    return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content


def picture(extra=b""):
    return box(b"avc1", bytes(78) + box(b"avcC", b"settings") + extra)


FILE_TYPE = box(b"ftyp", b"isom" + bytes(4))


@pytest.fixture
def parts(tmp_path):
    def read(data):
        (tmp_path / "a.mp4").write_bytes(data)
        return read_video_parts(tmp_path / "a.mp4")

    return read


def test_tracks_are_told_wherever_the_data_stand(parts):
    movie = box(b"moov", box(b"mvhd", bytes(100)) + track(b"vide", picture()) + track(b"soun") + track(b"meta"))
    expected = VideoParts("mp4", ("vide", "soun", "meta"), False)
    assert parts(FILE_TYPE + movie + box(b"mdat", b"soun" * 50)) == expected
    assert parts(FILE_TYPE + large_box(b"mdat", bytes(300)) + movie) == expected
    assert parts(movie[:4] + movie[4:]) == expected, "old MOV files begin with their moov"
    # A size of 0 means: to the end of the file.
    assert parts(FILE_TYPE + movie + bytes(4) + b"mdat" + bytes(99)) == expected


@pytest.mark.parametrize(
    "spherical",
    [
        track(b"vide", picture(), extra=box(b"uuid", SPHERICAL_V1 + b"<rdf:SphericalVideo>")),
        track(b"vide", picture(box(b"st3d", bytes(5)) + box(b"sv3d", box(b"svhd", bytes(5))))),
    ],
)
def test_360_metadata_of_both_versions_are_seen(parts, spherical):
    assert parts(FILE_TYPE + box(b"moov", spherical)).is_spherical
    other = track(b"vide", picture(), extra=box(b"uuid", bytes(16) + SPHERICAL_V1))
    assert not parts(FILE_TYPE + box(b"moov", other)).is_spherical


def test_what_stands_before_the_damage_is_told(parts):
    whole = FILE_TYPE + box(b"moov", track(b"vide") + track(b"soun"))
    assert parts(whole + struct.pack(">I4s", 1 << 30, b"mdat")).tracks == ("vide", "soun")
    for size in (2, 7):  # smaller than a head
        assert parts(FILE_TYPE + struct.pack(">I4s", size, b"moov") + whole).tracks == ()
    assert parts(FILE_TYPE + struct.pack(">I4sQ", 1, b"moov", 2**64 - 1)).tracks == ()
    for length in range(12, len(whole)):
        assert parts(whole[:length]).tracks in ((), ("vide",), ("vide", "soun"))


def test_hostile_boxes_take_no_time(parts):
    nested = b""
    for _ in range(5000):
        nested = box(b"moov", nested)
    start = time.perf_counter()
    assert parts(FILE_TYPE + nested).tracks == ()
    assert parts(FILE_TYPE + box(b"free") * 1_000_000 + box(b"moov", track(b"soun"))).tracks == ()
    assert time.perf_counter() - start < 5


def test_other_containers_are_told_apart_and_other_files_refused(tmp_path):
    path = tmp_path / "a.mp4"
    for head, container in [(b"RIFF\0\0\0\0AVI LIST", "avi"), (b"\x1a\x45\xdf\xa3" + bytes(9), "matroska")]:
        path.write_bytes(head)
        assert read_video_parts(path) == VideoParts(container)
    for head in (b"", b"text", b"#EXTM3U\nhttp://somewhere", b"RIFF\0\0\0\0WAVEfmt ", b"ffconcat version 1.0"):
        path.write_bytes(head)
        with pytest.raises(InputError, match=r"a\.mp4 is no video that can be read; convert it to MP4"):
            read_video_parts(path)
    for missing in (tmp_path, tmp_path / "none.mp4"):
        with pytest.raises(InputError, match="is no file; give a video"):
            read_video_parts(missing)
