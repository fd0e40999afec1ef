"""Oracles: OpenCV reads the PNG, a parser of its own (struct, line by line) reads the PLY."""

import errno
import struct

import numpy as np
import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.reporting import files
from lightning_plugins.reporting.files import read_depth_png, write_depth_png, write_panorama_cloud, write_point_cloud

SIZES = {"float": ("f", 4), "uchar": ("B", 1)}


def parse_ply(path):
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    assert [name for _, name in properties] == ["x", "y", "z", "red", "green", "blue"]
    layout = "<" + "".join(SIZES[kind][0] for kind, _ in properties)
    assert len(body) == count * struct.calcsize(layout)
    return [struct.unpack_from(layout, body, i * struct.calcsize(layout)) for i in range(count)]


def test_depth_is_16_bit_millimetres_to_opencv(tmp_path):
    cv2 = pytest.importorskip("cv2")
    depth_m = np.array([[0.0, 0.0002, 1.2344, 65.535], [np.nan, np.inf, -1.0, 3.0]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=bool)
    write_depth_png(tmp_path / "depth.png", depth_m, mask)
    read = cv2.imread(str(tmp_path / "depth.png"), cv2.IMREAD_UNCHANGED)
    assert read.dtype == np.uint16
    assert read.tolist() == [[0, 1, 1234, 65535], [0, 0, 0, 0]]


def test_depth_round_trip_is_within_half_a_millimetre(tmp_path):
    depth_m = np.random.default_rng(0).uniform(0.1, 60, (32, 64)).astype(np.float32)
    write_depth_png(tmp_path / "depth.png", depth_m)
    assert np.abs(read_depth_png(tmp_path / "depth.png").astype(np.float64) - depth_m).max() <= 0.000501


def test_depth_beyond_the_format_is_clamped_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match=r"2 pixels of .*depth\.png are deeper than 65\.535 m \(up to 120\.0 m\)"):
        write_depth_png(tmp_path / "depth.png", np.array([[1.0, 70.0, 120.0]]))
    np.testing.assert_allclose(read_depth_png(tmp_path / "depth.png"), [[1.0, 65.535, 65.535]], rtol=1e-6)


def test_depth_of_a_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must both be \(height, width\), got \(1, 2, 3\)"):
        write_depth_png(tmp_path / "depth.png", np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="one map at a time"):
        write_depth_png(tmp_path / "depth.png", np.ones((2, 3)), np.ones((3, 2), dtype=bool))


def test_reading_what_is_no_depth_map_is_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 2)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match="mode RGB, not a depth map; give a 16-bit grey PNG in millimetres"):
        read_depth_png(tmp_path / "colour.png")
    with pytest.raises(InputError, match=r"none\.png cannot be read as a depth map"):
        read_depth_png(tmp_path / "none.png")


def test_points_and_colours_come_back(tmp_path):
    points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    colours = np.random.default_rng(1).integers(0, 256, (50, 3), dtype=np.uint8)
    write_point_cloud(tmp_path / "room.ply", points, colours)
    read = np.array(parse_ply(tmp_path / "room.ply"))
    assert np.array_equal(read[:, :3].astype(np.float32), points)
    assert np.array_equal(read[:, 3:], colours)


def test_panorama_of_unit_depth_is_a_unit_sphere_without_its_holes(tmp_path):
    directions = np.random.default_rng(0).normal(size=(4, 8, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    depth_m = np.ones((4, 8))
    depth_m[0, 0], depth_m[0, 1] = np.nan, 0.0
    mask = np.ones((4, 8), dtype=bool)
    mask[3, 7] = False
    image = np.full((4, 8, 3), 9, dtype=np.uint8)
    assert write_panorama_cloud(tmp_path / "sphere.ply", image, depth_m, directions, mask) == 29
    read = np.array(parse_ply(tmp_path / "sphere.ply"))
    np.testing.assert_allclose(np.linalg.norm(read[:, :3], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(read[0, :3], directions[0, 2], atol=1e-6)


def test_wrong_points_are_refused(tmp_path):
    colours = np.zeros((2, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"must both be \(points, 3\), got \(3, 3\) and \(2, 3\)"):
        write_point_cloud(tmp_path / "a.ply", np.zeros((3, 3)), colours)
    with pytest.raises(ValueError, match="must be uint8 from 0 to 255, got float64"):
        write_point_cloud(tmp_path / "a.ply", np.zeros((2, 3)), colours.astype(float))
    with pytest.raises(ValueError, match="points must be finite"):
        write_point_cloud(tmp_path / "a.ply", np.full((2, 3), np.nan), colours)
    with pytest.raises(ValueError, match="resize the image to the depth"):
        write_panorama_cloud(tmp_path / "a.ply", np.zeros((4, 8, 3), np.uint8), np.ones((2, 4)), np.ones((2, 4, 3)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    write_depth_png(tmp_path / "depth.png", np.ones((2, 4)))
    before = (tmp_path / "depth.png").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_depth_png(tmp_path / "depth.png", np.full((2, 4), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["depth.png"]
    assert (tmp_path / "depth.png").read_bytes() == before
