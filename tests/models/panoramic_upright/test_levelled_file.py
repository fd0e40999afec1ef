"""Oracles: a world drawn in closed form and seen by cameras that scipy turned; Pillow and xml.etree read the files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from lightning_plugins._support.errors import InputError
from lightning_plugins.models.panoramic_upright.levelled_file import check_levelling, level_file
from tests.support.panorama_files import SRGB, SUFFIXES, exif_block, gpano_of, packet, write

# Forward, right, down in aviation, whose angles these are; forward, left, up here.
AVIATION = np.diag([1.0, -1.0, -1.0])


def camera(heading_deg, pitch_deg, roll_deg):
    """Return the rotation from the camera's frame to the world's: x north, y west, z up."""
    return AVIATION @ Rotation.from_euler("ZYX", [heading_deg, pitch_deg, roll_deg], degrees=True).as_matrix() @ AVIATION


def directions(rows):
    row, column = np.mgrid[:rows, : 2 * rows]
    colatitude, longitude = np.pi * (row + 0.5) / rows, np.pi * ((column + 0.5) / rows - 1)
    radius = np.sin(colatitude)
    return np.stack([radius * np.cos(longitude), -radius * np.sin(longitude), np.cos(colatitude)], axis=-1)


def world(to):
    """Return the colours (..., 3) of a world: a sky that brightens upwards, a red lamp in the north, a blue one in the east."""
    lamp = [np.exp(8 * (to @ at - 1)) for at in ([1, 0, 0], [0, -1, 0])]
    return np.stack([40 + 200 * lamp[0], 128 + 100 * to[..., 2], 40 + 200 * lamp[1]], axis=-1)


def seen(pose, rows=64):
    return np.rint(world(directions(rows) @ camera(*pose).T)).astype(np.uint8)


def up_of(pose):
    return camera(*pose).T @ [0, 0, 1]


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


POSES = [(30, 10, -5), (200, -35, 20), (359.9, 5, 170), (90, 0, 180), (123, 60, 40), (10, 0, 0), (250, 89.9, 0), (77, -90, 0)]


@pytest.mark.parametrize("pose", POSES)
def test_the_level_file_is_the_world_seen_level_at_the_heading_that_it_gives(tmp_path, pose):
    xmp = packet(f'GPano:ProjectionType="equirectangular" GPano:PoseHeadingDegrees="{pose[0]}"')
    source = write(tmp_path / "tilted.png", seen(pose), xmp=xmp)
    done = level_file(source, tmp_path / "level.png", up_of(pose))
    tags = gpano_of(done.destination)
    assert (float(tags["PosePitchDegrees"]), float(tags["PoseRollDegrees"])) == (0, 0)
    heading = float(tags["PoseHeadingDegrees"])
    assert 0 <= heading < 360
    assert done.heading_before_deg == pose[0]
    assert done.heading_after_deg == pytest.approx(heading, abs=1e-4)
    # A heading that was wrong by one degree would show: a lamp's colour changes by up to 6 levels per degree.
    assert np.abs(pixels_of(done.destination) - world(directions(64) @ camera(heading, 0, 0).T)).max() < 2


@pytest.mark.parametrize("pose", POSES)
def test_the_rotation_its_angles_and_the_smallest_turn(tmp_path, pose):
    source = write(tmp_path / "tilted.png", seen(pose))
    done = level_file(source, tmp_path / "level.png", torch.tensor(up_of(pose)).float())
    rotation = done.rotation.numpy()
    np.testing.assert_allclose(rotation @ up_of(pose), [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(rotation, camera(done.yaw_deg, done.pitch_deg, done.roll_deg), atol=1e-6)
    assert np.rad2deg(Rotation.from_matrix(rotation).magnitude()) == pytest.approx(done.tilt_deg, abs=0.05)
    assert done.heading_before_deg is done.heading_after_deg is None
    assert "PoseHeadingDegrees" not in gpano_of(done.destination)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("pose", POSES)
def test_tags_alone_tell_how_the_camera_stood(tmp_path, suffix, pose):
    source = write(
        tmp_path / f"tilted{suffix}", seen(pose), xmp=packet(f'GPano:PoseHeadingDegrees="{pose[0]}"'), exif=exif_block()
    )
    done = level_file(source, tmp_path / f"tagged{suffix}", up_of(pose), tags_only=True)
    assert np.array_equal(pixels_of(source), pixels_of(done.destination))
    told = [float(gpano_of(done.destination)[f"Pose{angle}Degrees"]) for angle in ("Heading", "Pitch", "Roll")]
    np.testing.assert_allclose(camera(*told), camera(*pose), atol=1e-5)
    assert done.heading_after_deg == done.heading_before_deg
    assert -90 <= told[1] <= 90
    assert -180 < told[2] <= 180


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_levelled_with_its_metadata(tmp_path, suffix):
    pose = (30, 15, -10)
    options = {"quality": 95} if suffix == ".jpg" else {}
    source = write(
        tmp_path / f"tilted{suffix}", seen(pose), packet('GPano:PoseHeadingDegrees="30"'), exif_block(), SRGB, **options
    )
    before = source.read_bytes()
    done = level_file(source, tmp_path / f"level{suffix}", up_of(pose))
    assert source.read_bytes() == before
    assert set(done.kept) == {"EXIF", "ICC profile", "XMP"}
    assert (done.dropped, done.notes, done.skipped) == ((), (), False)
    heading = float(gpano_of(done.destination)["PoseHeadingDegrees"])
    error = np.abs(pixels_of(done.destination) - world(directions(64) @ camera(heading, 0, 0).T))
    assert error.mean() < 2
    with Image.open(done.destination) as image:
        assert image.info["icc_profile"] == SRGB
        assert image.getexif()[0x0110] == "Sphere 1"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("tags_only", [False, True])
def test_a_tilt_below_the_uncertainty_leaves_the_file_as_it_is(tmp_path, tags_only):
    up = [np.sin(np.deg2rad(1.2)), 0, np.cos(np.deg2rad(1.2))]
    source = write(tmp_path / "room.jpg", xmp=packet('GPano:PoseHeadingDegrees="5"'), exif=exif_block())
    done = level_file(source, tmp_path / "copy.jpg", up, sigma_deg=1.3, tags_only=tags_only)
    assert done.skipped
    assert done.tilt_deg == pytest.approx(1.2)
    assert done.destination.read_bytes() == source.read_bytes()
    assert done.heading_after_deg == 5
    assert done.notes == ("level already: its tilt of 1.20 degrees is below the estimate's uncertainty of 1.30",)
    for sigma_deg in (1.1, 0, None):
        assert not level_file(source, tmp_path / "copy.jpg", up, sigma_deg=sigma_deg, tags_only=tags_only).skipped
    assert done.destination.read_bytes() != source.read_bytes()


@pytest.mark.parametrize("link", [os.link, os.symlink, None])
def test_the_source_is_never_written_to(tmp_path, link):
    source = write(tmp_path / "room.png")
    before = source.read_bytes()
    destination = tmp_path / "other.png" if link else tmp_path / "." / ".." / tmp_path.name / "room.png"
    if link:
        link(source, destination)
    for options in ({}, {"tags_only": True}, {"sigma_deg": 180}):
        with pytest.raises(InputError, match="is the source itself, which is never written to"):
            level_file(source, destination, [0, 0, 1], **options)
    assert source.read_bytes() == before


def test_a_copy_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    source, destination = write(tmp_path / "room.png"), tmp_path / "level.png"
    destination.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        level_file(source, destination, [0, 1, 1])
    assert destination.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["level.png", "room.png"]


def test_the_files_own_pitch_and_roll_give_way_and_are_named(tmp_path):
    pose = (40, 12, 8)
    tags = 'GPano:PoseHeadingDegrees="40" GPano:PosePitchDegrees="12" GPano:PoseRollDegrees="3"'
    source = write(tmp_path / "room.png", seen(pose), xmp=packet(tags))
    done = level_file(source, tmp_path / "level.png", up_of(pose))
    # Five degrees of roll at a pitch of twelve.
    assert done.notes == ("the tags gave pitch 12 and roll 3; the estimate, 4.9 degrees away, replaced them",)
    heading = done.heading_after_deg
    assert np.abs(pixels_of(done.destination) - world(directions(64) @ camera(heading, 0, 0).T)).max() < 2


@pytest.mark.parametrize("heading", ["north", "nan", "1e999", ""])
def test_a_heading_that_is_no_number_is_taken_out(tmp_path, heading):
    source = write(tmp_path / "room.jpg", xmp=packet(f'GPano:PoseHeadingDegrees="{heading}"'))
    done = level_file(source, tmp_path / "level.jpg", [0, 1, 5])
    assert "PoseHeadingDegrees" not in gpano_of(done.destination)
    assert done.heading_before_deg is None
    assert f"is no number ({heading!r}) and was taken out" in done.notes[0]


def test_a_heading_beyond_the_circle_is_brought_into_it(tmp_path):
    source = write(tmp_path / "room.jpg", xmp=packet('GPano:PoseHeadingDegrees="-0.00001"'))
    done = level_file(source, tmp_path / "level.jpg", [0, 0, 1])
    assert gpano_of(done.destination)["PoseHeadingDegrees"] == "0.0000"


def test_hostile_xmp_is_named_and_the_photograph_is_levelled(tmp_path):
    pose = (0, 20, 0)
    xmp = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>' + packet('dc:rights="&e;"')
    source = write(tmp_path / "room.png", seen(pose), xmp=xmp)
    done = level_file(source, tmp_path / "level.png", up_of(pose))
    assert done.dropped == ("XMP: it has a document type or entities, which no XMP needs and a hostile one uses",)
    assert gpano_of(done.destination)["ProjectionType"] == "equirectangular"
    assert np.abs(pixels_of(done.destination) - world(directions(64))).max() < 2


def test_exif_orientation_is_applied_to_the_pixels_and_reset(tmp_path):
    pose = (0, 20, -5)
    stored = seen(pose)[::-1, ::-1]
    source = write(tmp_path / "room.jpg", np.ascontiguousarray(stored), exif=exif_block(orientation=3), quality=97)
    done = level_file(source, tmp_path / "level.jpg", up_of(pose))
    with Image.open(done.destination) as image:
        assert image.getexif()[0x0112] == 1
    expected = world(directions(64) @ camera(-done.yaw_deg, 0, 0).T)
    assert np.abs(pixels_of(done.destination) - expected).mean() < 2
    assert done.notes == ("the EXIF orientation was applied to the pixels",)
    with pytest.raises(InputError, match="EXIF orientation is 3 and viewers differ"):
        level_file(source, tmp_path / "tagged.jpg", up_of(pose), tags_only=True)


def test_grey_stays_grey_and_16_bits_alpha_and_palettes_say_what_became_of_them(tmp_path):
    def levelled(image, suffix=".png"):
        image.save(tmp_path / f"room{suffix}")
        done = level_file(tmp_path / f"room{suffix}", tmp_path / f"level{suffix}", [1, 0, 3])
        return Image.open(done.destination).mode, done.notes

    colour = Image.fromarray(seen((0, 0, 0)))
    assert levelled(colour.convert("L")) == ("L", ())
    assert levelled(colour.convert("L"), ".jpg") == ("L", ())
    grey = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    assert levelled(grey) == ("L", ("16 bits a channel became 8",))
    assert levelled(grey, ".tif") == ("L", ("16 bits a channel became 8",))
    assert levelled(colour.convert("RGBA")) == ("RGB", ("transparent pixels were laid over grey",))
    assert levelled(colour.convert("P")) == ("RGB", ("palette became RGB",))
    assert levelled(colour.convert("CMYK"), ".jpg") == ("RGB", ("CMYK became RGB",))
    cv2 = pytest.importorskip("cv2", reason="OpenCV writes 16-bit colour")
    cv2.imwrite(str(tmp_path / "deep.png"), np.asarray(colour).astype(np.uint16) * 257)
    assert level_file(tmp_path / "deep.png", tmp_path / "level.png", [1, 0, 3]).notes == ("16 bits a channel became 8",)


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    source = write(tmp_path / "room.png")
    (tmp_path / "folder.png").mkdir()
    write(tmp_path / "square.png", np.zeros((64, 64, 3), dtype=np.uint8))
    (tmp_path / "text.png").write_text("no image")
    part = 'GPano:CroppedAreaImageHeightPixels="32" GPano:FullPanoHeightPixels="64"'
    write(tmp_path / "part.png", xmp=packet(part))
    write(tmp_path / "cylinder.png", xmp=packet('GPano:ProjectionType="cylindrical"'))
    write(tmp_path / "room.webp")
    before = sorted(tmp_path.iterdir())
    for name, destination, options, words in [
        ("none.png", "level.png", {}, "none.png does not exist"),
        ("square.png", "level.png", {}, "2:1"),
        ("text.png", "level.png", {}, "no image that can be read"),
        ("part.png", "level.png", {}, "shows 32 of its panorama's 64 pixels of height"),
        ("cylinder.png", "level.png", {}, "calls its projection 'cylindrical'"),
        ("room.png", "level.jpg", {}, "must end in .png"),
        ("room.png", "folder.png", {}, "is a folder; give the name"),
        ("room.png", "missing/level.png", {}, "does not exist; make it"),
        ("room.png", "level.png", {"sigma_deg": -1.0}, "sigma_deg must be 0 or more, got -1.0"),
        ("room.png", "level.png", {"sigma_deg": float("nan")}, "sigma_deg must be 0 or more, got nan"),
        ("room.webp", "level.webp", {"tags_only": True}, "a WEBP, cannot be changed"),
    ]:
        with pytest.raises(InputError) as error:
            level_file(tmp_path / name, tmp_path / destination, [0, 1, 1], **options)
        assert words in str(error.value)
    for up in ([0, 0, 0], [0, float("nan"), 1], [0, 1], torch.eye(3)):
        with pytest.raises(InputError, match="three finite numbers that are not all 0"):
            level_file(source, tmp_path / "level.png", up)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_8192_x_4096_takes_far_less_than_4_gb(tmp_path):
    write(tmp_path / "room.jpg", np.kron(seen((0, 10, 5), 256), np.ones((16, 16, 1), dtype=np.uint8)), exif=exif_block())
    script = f"""
import re
from lightning_plugins.models.panoramic_upright.levelled_file import check_levelling, level_file
done = level_file({str(tmp_path / "room.jpg")!r}, {str(tmp_path / "level.jpg")!r}, [0.1, 0.2, 0.9])
print(int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""
    peak_gib = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert peak_gib < 1.2
    with Image.open(tmp_path / "level.jpg") as image:
        assert image.size == (8192, 4096)


@pytest.mark.parametrize("tags_only", [False, True])
def test_what_would_be_refused_is_refused_beforehand(tmp_path, tags_only):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    good = tmp_path / "good.jpg"
    Image.fromarray(pixels).save(good)
    assert check_levelling(good, tags_only).format == "JPEG"
    odd, tiff = tmp_path / "odd.png", tmp_path / "room.tif"
    Image.fromarray(pixels[:, :127]).resize((1025, 512)).save(odd)
    Image.fromarray(pixels).save(tiff)
    refused = {
        False: (odd, "odd.png is 1025 pixels wide, and an even number is needed"),
        True: (tiff, "the tags of .*room.tif, a TIFF"),
    }
    path, words = refused[tags_only]
    for attempt in (
        lambda: check_levelling(path, tags_only),
        lambda: level_file(path, path.with_stem("level"), (0.1, 0, 1), tags_only=tags_only),
    ):
        with pytest.raises(InputError, match=words):
            attempt()
    other, _ = refused[not tags_only]
    assert check_levelling(other, tags_only)


def test_tags_of_a_photograph_that_is_level_are_told(tmp_path):
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:PoseRollDegrees="25"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    source = tmp_path / "room.jpg"
    Image.new("RGB", (128, 64)).save(source, xmp=xmp.encode())
    done = level_file(source, tmp_path / "level.jpg", (0.0, 0.0, 1.0), sigma_deg=1.0)
    assert done.skipped
    assert done.notes[1] == "the tags gave pitch 0 and roll 25; a viewer that reads them still turns it"
