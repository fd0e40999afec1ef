"""Oracles: fields in closed form, a bicubic sum over the sphere's pixels in plain numpy, and the memory that a process used."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from lightning_plugins.engines.sphere import rotate_equirectangular, rotate_in_tiles
from tests.engines.sphere.fields import BandLimited, grid_directions, random_rotation


def noise(rows, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 2 * rows, channels), dtype=np.uint8)


def on_sphere(image, row, column):
    rows, columns = image.shape[:2]
    if row < 0:
        row, column = -1 - row, column + columns // 2
    elif row >= rows:
        row, column = 2 * rows - 1 - row, column + columns // 2
    return image[row, column % columns].astype(np.float64)


def keys(distance):
    """The kernel of Keys, 1981, with a = -1/2."""
    d = abs(distance)
    return 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def bicubic(image, rotation):
    rows, columns = image.shape[:2]
    result = np.zeros(image.shape)
    for row, column in np.ndindex(rows, columns):
        colatitude, longitude = np.pi * (row + 0.5) / rows, 2 * np.pi * ((column + 0.5) / columns - 0.5)
        to = [np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude), np.cos(colatitude)]
        x, y, z = rotation.T @ to
        v = np.arccos(np.clip(z, -1, 1)) / np.pi * rows - 0.5
        u = (np.arctan2(-y, x) / (2 * np.pi) + 0.5) * columns - 0.5
        for i in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
            for j in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                result[row, column] += keys(v - i) * keys(u - j) * on_sphere(image, i, j)
    return np.clip(np.rint(result), 0, 255)


def test_equals_the_bicubic_sum_at_seam_and_poles_and_never_wraps_round():
    # Of black and white alone: half of what bicubic makes of it lies outside of 0..255.
    image = (noise(24) > 127).astype(np.uint8) * 255
    rotation = random_rotation(1)
    turned = rotate_in_tiles(image, torch.tensor(rotation), tile_rows=7)
    assert np.abs(turned - bicubic(image, rotation)).max() <= 1
    assert (turned == bicubic(image, rotation)).mean() > 0.999


@pytest.mark.parametrize("seed", [0, 1])
def test_a_field_turns_as_its_argument_does(seed):
    field, rotation = BandLimited(6, seed), random_rotation(seed)
    directions = grid_directions(128, 256)
    scale = 100 / np.abs(field(directions)).max()
    image = np.rint(128 + scale * field(directions)).astype(np.uint8)[..., None]
    turned = rotate_in_tiles(image, torch.tensor(rotation, dtype=torch.float32))
    assert np.abs(turned[..., 0] - (128 + scale * field(directions @ rotation))).max() < 1.5


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("tile_rows", [1, 5, 32, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_whole_whatever_the_tiles(mode, tile_rows, dtype):
    image, rotation = noise(48, channels=2), torch.tensor(random_rotation(2))
    planes = torch.tensor(image).permute(2, 0, 1)[None].double()
    whole = rotate_equirectangular(planes, rotation, mode)[0].permute(1, 2, 0).numpy()
    turned = rotate_in_tiles(image, rotation.to(dtype), mode, tile_rows)
    if mode == "nearest":  # between two pixels rounding decides
        assert (turned == whole).mean() > 0.999
    else:
        assert np.abs(turned - np.clip(whole, 0, 255)).max() < 0.52


def test_identity_and_turns_by_whole_columns_are_exact():
    image = noise(32, channels=1)
    assert np.array_equal(rotate_in_tiles(image, torch.eye(3)), image)
    turn = Rotation.from_euler("z", -90, degrees=True).as_matrix()
    assert np.array_equal(rotate_in_tiles(image, torch.tensor(turn)), np.roll(image, 16, axis=1))


def test_memory_does_not_grow_with_the_directions():
    script = """
import re, numpy, torch
from lightning_plugins.engines.sphere import rotate_in_tiles, rotation_from_up
image = numpy.zeros((1024, 2048, 3), dtype=numpy.uint8)
rotation = rotation_from_up(torch.tensor([0.1, 0.2, 0.9]))
def peak_kib():
    # What getrusage gives counts the process that started this one as well.
    return int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
rotate_in_tiles(image[:64, :128], rotation)
before = peak_kib()
rotate_in_tiles(image, rotation)
print((peak_kib() - before) / 1024)
"""
    grown_mib = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    # The photograph is 6 MiB. Beside it: its planes, the padded ones, the result, and what 16 rows of 2048 pixels need.
    assert grown_mib < 3 * 6 + 16 * 2048 * 250 / 2**20 + 8


def test_bad_input_is_refused():
    image, rotation = noise(8), torch.eye(3)
    with pytest.raises(ValueError, match=r"got \(8, 16\) of uint8"):
        rotate_in_tiles(image[:, :, 0], rotation)
    with pytest.raises(ValueError, match=r"8 bits, got .* of float64"):
        rotate_in_tiles(image / 255, rotation)
    with pytest.raises(ValueError, match=r"rotation must have shape \(3, 3\), got \(1, 3, 3\)"):
        rotate_in_tiles(image, rotation[None])
    with pytest.raises(ValueError, match="mode must be one of nearest, bilinear, bicubic, got 'cubic'"):
        rotate_in_tiles(image, rotation, "cubic")
    with pytest.raises(ValueError, match="tile_rows must be 1 or more, got 0"):
        rotate_in_tiles(image, rotation, tile_rows=0)
    with pytest.raises(ValueError, match="must be even, got 15"):
        rotate_in_tiles(image[:, :15], rotation)
