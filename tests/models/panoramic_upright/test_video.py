"""Oracle: videos whose colours tell each pixel's direction in the world, so that a frame's own tilt and turn can be read off it.

They are painted here in numpy, colour = 127.5 + 110 (direction in the world), and fitted by least squares: no code is shared.
"""

import resource
import struct
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.rendering import TRAINING_ROOMS, render_room
from lightning_plugins.models.panoramic_upright.vertical_lines import estimate_up_from_lines
from lightning_plugins.models.panoramic_upright.video import level_video
from tests.support.video_boxes import box, track

cv2 = pytest.importorskip("cv2")
HEIGHT, RATE_HZ = 64, 15.0


def turn(axis, angle_deg):
    """Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=np.float64)
    angle = np.radians(angle_deg)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rays(height):
    """Unit vectors ``(height, 2 height, 3)``."""
    colatitude = np.pi * (np.arange(height)[:, None] + 0.5) / height
    longitude = 2 * np.pi * ((np.arange(2 * height) + 0.5) / (2 * height) - 0.5)
    sine = np.sin(colatitude)
    return np.stack([sine * np.cos(longitude), -sine * np.sin(longitude), np.cos(colatitude) + 0 * longitude], axis=-1)


def paint(world_from_camera, height=HEIGHT):
    return np.rint(127.5 + 110 * rays(height) @ world_from_camera.T).astype(np.uint8)


def read_off(rgb):
    """Return what ``paint`` was given, ``(3, 3)`` world from camera, of an image ``(H, W, 3)``."""
    world = (np.asarray(rgb, dtype=np.float64).reshape(-1, 3) - 127.5) / 110
    return np.linalg.lstsq(rays(len(rgb)).reshape(-1, 3), world, rcond=None)[0].T


def sway(frame):
    """The camera's turns in a walk: some degrees to and fro about an inclined mean; frame k is also turned by 2 k about z."""
    seconds = frame / RATE_HZ
    tilt = turn((1, 0, 0), 6 + 5 * np.sin(2 * np.pi * 0.3 * seconds)) @ turn(
        (0, 1, 0), 4 * np.sin(2 * np.pi * 0.23 * seconds + 1)
    )
    return turn((0, 0, 1), 2 * frame) @ tilt


def write_video(path, frames, rate_hz=RATE_HZ):
    height, width = frames[0].shape[:2]
    codec = cv2.VideoWriter.fourcc(*("MJPG" if path.suffix == ".avi" else "mp4v"))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, codec, rate_hz, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (image := capture.read()[1]) is not None:
        frames.append(image[..., ::-1])
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == len(frames)
    return frames, capture.get(cv2.CAP_PROP_FPS)


def estimate(image):
    """The truth, as far as 8 bits and the codec left it."""
    up = read_off(255 * image.permute(1, 2, 0).numpy())[2]
    return torch.from_numpy(up), 1.0


def angle_deg(one, other):
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(one, other), axis=-1), (one * other).sum(axis=-1)))


def ups(frames):
    """The up of each frame, as it is read off it."""
    found = np.array([read_off(frame)[2] for frame in frames])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


LEVEL = np.array([0.0, 0.0, 1.0])
WALK = [paint(sway(frame)) for frame in range(60)]


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_swaying_video_is_level(tmp_path, suffix):
    source = write_video(tmp_path / f"tilted{suffix}", WALK)
    before = source.read_bytes()
    done = level_video(source, tmp_path / f"level{suffix}", estimate)
    level, rate_hz = read_video(done.destination)
    assert (len(level), rate_hz, done.frame_rate_hz, level[0].shape) == (60, RATE_HZ, RATE_HZ, WALK[0].shape)
    assert (done.frames_broken, done.frames_repeated, done.frames_without_cue, done.notes) == (0, 0, 0, ())
    assert angle_deg(ups(WALK), LEVEL).mean() > 5
    assert angle_deg(ups(level), LEVEL).max() < 0.9
    truth = np.array([sway(frame)[2] for frame in range(60)])
    assert angle_deg(done.up, truth).max() < 0.6
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"level{suffix}", f"tilted{suffix}"]


def test_without_smoothing_each_frame_is_level_by_itself(tmp_path):
    source = write_video(tmp_path / "tilted.avi", WALK[:10])
    level, _ = read_video(level_video(source, tmp_path / "level.avi", estimate, smoothing_s=0).destination)
    assert angle_deg(ups(level), LEVEL).max() < 0.3
    # The smallest rotation: the camera's heading stays, up to what the tilt itself turns.
    for frame, image in enumerate(level):
        turned = read_off(image)
        assert np.degrees(np.arctan2(turned[1, 0], turned[0, 0])) == pytest.approx(2 * frame, abs=1.0)


def noisy(sigma_deg, seed=0):
    generator = np.random.default_rng(seed)

    def guess(image):
        up = estimate(image)[0].numpy()
        return torch.from_numpy(up + generator.normal(scale=np.radians(sigma_deg), size=3)), sigma_deg

    return guess


def test_smoothing_removes_most_of_the_noise_and_keeps_the_sway(tmp_path):
    source = write_video(tmp_path / "tilted.avi", WALK)
    left, jitter = {}, {}
    for smoothing_s in (0.0, 0.5):
        done = level_video(source, tmp_path / "level.avi", noisy(2.0), smoothing_s=smoothing_s)
        seen = ups(read_video(done.destination)[0])
        left[smoothing_s] = np.sqrt((angle_deg(seen, LEVEL) ** 2).mean())
        jitter[smoothing_s] = np.sqrt((angle_deg(seen[1:], seen[:-1]) ** 2).mean())
    assert left[0.0] == pytest.approx(2.0 * np.sqrt(2), rel=0.2)
    assert left[0.5] < 0.6 * left[0.0]
    assert jitter[0.5] < 0.2 * jitter[0.0]


def test_unsure_frames_and_those_without_cue_follow_the_others(tmp_path):
    source = write_video(tmp_path / "tilted.avi", WALK)
    seen = iter(range(60))

    def guess(image):
        up, error_deg = estimate(image)
        frame = next(seen)
        if frame % 5 == 0:
            return torch.tensor([1.0, 0.0, 0.0]), 60.0
        if frame % 5 == 1:
            return torch.full((3,), float("nan")), float("nan")
        return (up + 0.3, 14.0) if frame % 5 == 2 else (up, error_deg)

    done = level_video(source, tmp_path / "level.avi", guess)
    assert done.frames_without_cue == 24
    assert angle_deg(ups(read_video(done.destination)[0]), LEVEL).max() < 2.0


def test_a_camera_that_hangs_upside_down_does_not_whirl(tmp_path):
    frames = [paint(sway(frame) @ turn((0, 1, 0), 180 - 6 * np.cos(frame / 8))) for frame in range(30)]
    source = write_video(tmp_path / "hanging.avi", frames)
    level = read_video(level_video(source, tmp_path / "level.avi", estimate).destination)[0]
    assert angle_deg(ups(level), LEVEL).max() < 1.5
    heading = np.unwrap([np.arctan2(*read_off(image)[(1, 0), 0]) for image in level])
    assert np.degrees(np.abs(np.diff(heading))).max() < 4  # the video itself turns by 2


def test_rooms_are_level_by_their_lines(tmp_path):
    distribution = replace(TRAINING_ROOMS, max_tilt_deg=20.0)
    tilts = [turn((0, 1, 0), 8 + 4 * np.sin(frame)) @ turn((1, 0, 0), -5 + frame) for frame in range(8)]
    source = write_video(tmp_path / "room.avi", [render_room(3, 160, 320, distribution, tilt).image for tilt in tilts])

    def lines(image):
        found = estimate_up_from_lines(image)
        return (torch.zeros(3), float("inf")) if found is None else (found.up, found.angle_sigma_deg)

    done = level_video(source, tmp_path / "level.avi", lines, estimate_height_px=160, smoothing_s=0)
    truth = np.array([tilt[2] for tilt in tilts])
    assert angle_deg(done.up, truth).mean() < 1.5
    assert done.frames_without_cue <= 2


def avi_frames(data):
    """Where each frame's bytes begin, and how many they are, up to the index at the end."""
    place = data.index(b"movi") + 4
    while data[place : place + 4] == b"00dc":
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        yield place + 8, size
        place += 8 + size + size % 2


def heading_deg(image):
    turned = read_off(image)
    return np.degrees(np.arctan2(turned[1, 0], turned[0, 0])) % 360


def test_broken_frames_are_skipped_and_counted_and_the_rest_keeps_its_time(tmp_path):
    # Tilted from side to side, so that none is level by its neighbours' tilts.
    tilted = [paint(turn((0, 0, 1), 2 * frame) @ turn((1, 0, 0), 10 * (frame % 3 - 1))) for frame in range(24)]
    source = write_video(tmp_path / "tilted.avi", tilted)
    data = bytearray(source.read_bytes())
    places = list(avi_frames(data))
    assert len(places) == 24
    for frame in (0, 7, 8, 15, 23):
        start, size = places[frame]
        data[start : start + size] = bytes(size)
    source.write_bytes(data)
    asked = []

    def counted(image):
        asked.append(image)
        return estimate(image)

    done = level_video(source, tmp_path / "level.avi", counted, smoothing_s=0)
    level, rate_hz = read_video(done.destination)
    assert (len(asked), done.frames_broken, done.frames_repeated, done.frames_without_cue) == (19, 5, 5, 0)
    assert (len(level), len(done.up), rate_hz) == (24, 24, RATE_HZ)
    shown = [1, 1, 2, 3, 4, 5, 6, 6, 6, 9, 10, 11, 12, 13, 14, 14, *range(16, 23), 22]
    for image, frame in zip(level, shown, strict=True):
        assert heading_deg(image) == pytest.approx(2 * frame, abs=0.9)
    assert angle_deg(ups(level), LEVEL).max() < 1.0


def test_a_video_that_is_cut_off(tmp_path):
    source = write_video(tmp_path / "tilted.avi", WALK[:24])
    source.write_bytes(source.read_bytes()[: list(avi_frames(source.read_bytes()))[12][0]])
    done = level_video(source, tmp_path / "level.avi", estimate)
    assert (done.frames_broken, done.frames_repeated, len(read_video(done.destination)[0])) == (12, 12, 24)
    source = write_video(tmp_path / "tilted.mp4", WALK[:24])
    source.write_bytes(source.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"tilted\.mp4 is no video that can be read, or is cut off"):
        level_video(source, tmp_path / "other.mp4", estimate)
    assert not (tmp_path / "other.mp4").exists()


def test_a_long_gap_is_not_filled_without_end(tmp_path):
    source = write_video(tmp_path / "tilted.avi", WALK[:5])
    data = source.read_bytes()
    heads = data.index(b"avih") + 8 + 16, data.index(b"strh") + 8 + 32
    for head in heads:  # both say how many frames there are
        assert data[head : head + 4] == struct.pack("<I", 5)
        data = data[:head] + struct.pack("<I", 2_000_000_000) + data[head + 4 :]
    source.write_bytes(data)
    done = level_video(source, tmp_path / "level.avi", estimate)
    assert (done.frames_repeated, len(read_video(done.destination)[0])) == (150, 155)
    assert done.notes == ("1999999995 frames are missing after 0.3 s, and only 150 were filled",)


def test_what_is_not_copied_is_said(tmp_path):
    source = write_video(tmp_path / "tilted.mp4", WALK[:5])
    assert level_video(source, tmp_path / "level.mp4", estimate).dropped == ()
    data = source.read_bytes()
    start = data.index(b"moov") - 4
    assert start + int.from_bytes(data[start : start + 4], "big") == len(data), "OpenCV writes it last"
    # Descriptions that FFmpeg takes for whole: 28 bytes of numbers for sound, 8 for anything.
    sound = box(b"mp4a", bytes(6) + b"\0\1" + bytes(8) + struct.pack(">HHIHH", 2, 16, 0, 48000, 0))
    sensor = box(b"mett", bytes(6) + b"\0\1" + b"\0application/x\0")
    tags = box(b"uuid", bytes.fromhex("ffcc8263f8554a938814587a02521fdd") + b"<rdf:SphericalVideo/>")
    own = data.index(b"trak", start) - 4
    size = int.from_bytes(data[own : own + 4], "big")
    tagged = box(b"trak", data[own + 8 : own + size] + tags)
    movie = box(b"moov", data[start + 8 : own] + tagged + data[own + size :] + track(b"soun", sound) + track(b"meta", sensor))
    source.write_bytes(data[:start] + movie)
    done = level_video(source, tmp_path / "level.mp4", estimate)
    assert len(read_video(done.destination)[0]) == 5
    audio, others, metadata = done.dropped
    assert audio.startswith("1 track of audio; ffmpeg -i LEVEL -i SOURCE")
    assert others == "1 other track (meta)"
    assert metadata.startswith("360 metadata; players take the copy for a flat video")
    source = write_video(tmp_path / "tilted.avi", WALK[:5])
    assert level_video(source, tmp_path / "level.mp4", estimate).dropped[0].startswith("audio and 360 metadata, if it has any")


@contextmanager
def disk_of(size_bytes):
    """No file can be larger, as on a disk with that much space."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, suffix):
    source = write_video(tmp_path / "tilted.mp4", WALK[:12])
    destination = tmp_path / f"level{suffix}"
    size = level_video(source, destination, estimate).destination.stat().st_size
    destination.write_bytes(b"before")
    for limit in (0, size // 3, size - 700):
        with disk_of(limit), pytest.raises(InputError, match=r"could not be written whole|OpenCV cannot write") as error:
            level_video(source, destination, estimate)
        assert "free space" in str(error.value)
        assert destination.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([destination.name, "tilted.mp4"])


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    source = write_video(tmp_path / "tilted.mp4", WALK[:3])
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "playlist.avi").write_text(f"#EXTM3U\n#EXTINF:1,\n{source}\n")
    (tmp_path / "head.mp4").write_bytes(source.read_bytes()[:40])
    write_video(tmp_path / "wide.mp4", [np.zeros((64, 160, 3), dtype=np.uint8)] * 3)
    write_video(tmp_path / "small.mp4", [np.zeros((16, 32, 3), dtype=np.uint8)] * 3)
    damaged = write_video(tmp_path / "damaged.avi", WALK[:3])
    data = bytearray(damaged.read_bytes())
    for start, size in list(avi_frames(data)):
        data[start : start + size] = bytes(size)
    damaged.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    blind = lambda image: (torch.zeros(3), 1.0)  # noqa: E731
    for name, destination, options, words in [
        ("none.mp4", "level.mp4", {}, "none.mp4 is no file"),
        ("text.mp4", "level.mp4", {}, "is no video that can be read"),
        ("playlist.avi", "level.mp4", {}, "is no video that can be read"),
        ("head.mp4", "level.mp4", {}, "is no video that can be read"),
        ("wide.mp4", "level.mp4", {}, "is 160 x 64 pixels, and a 360 x 180 degree video is 2:1"),
        ("small.mp4", "level.mp4", {}, "is 32 x 16 pixels; valid are 32 rows or more"),
        ("damaged.avi", "level.mp4", {}, "holds no frame that can be decoded"),
        ("tilted.mp4", "tilted.mp4", {}, "is the source itself"),
        ("tilted.mp4", "level.webm", {}, "must end in .mp4 or .avi"),
        ("tilted.mp4", "none/level.mp4", {}, "does not exist; make it"),
        ("tilted.mp4", ".", {}, "is a folder; give the name"),
        ("tilted.mp4", "level.mp4", {"smoothing_s": -1.0}, "smoothing_s must be in [0, 10], got -1.0"),
        ("tilted.mp4", "level.mp4", {"smoothing_s": float("nan")}, "smoothing_s must be in [0, 10], got nan"),
        ("tilted.mp4", "level.mp4", {"max_error_deg": 0.0}, "max_error_deg must be in (0, 180], got 0.0"),
        ("tilted.mp4", "level.mp4", {"estimate_height_px": 8}, "estimate_height_px must be 32 or more, got 8"),
        ("tilted.mp4", "level.mp4", {"mode": "cubic"}, "cubic"),
        ("tilted.mp4", "level.mp4", {"estimate": blind}, "no frame shows where up is: none of 3"),
    ]:
        with pytest.raises(InputError) as error:
            level_video(tmp_path / name, tmp_path / destination, options.pop("estimate", estimate), **options)
        assert words in str(error.value)
        assert sorted(tmp_path.iterdir()) == before
    assert sorted(tmp_path.iterdir()) == before


def test_an_estimate_that_fails_leaves_nothing(tmp_path):
    source = write_video(tmp_path / "tilted.mp4", WALK[:3])
    with pytest.raises(ZeroDivisionError):
        level_video(source, tmp_path / "level.mp4", lambda image: 1 / 0)
    assert list(tmp_path.iterdir()) == [source]
