"""Oracles: the triangle filter written as a double sum on the sphere's pixels in float64, files written by OpenCV or byte by
byte, and the eight EXIF orientations as numpy flips."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import check_panorama, find_panoramas, name_apart, read_panorama, resize_panorama

cv2 = pytest.importorskip("cv2", reason="OpenCV writes the files that Pillow is tested on")


def noise(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def png_without_pixels(path, width, height):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    coded = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


def on_sphere(image, row, column):
    rows, columns = image.shape[:2]
    if row < 0:
        row, column = -1 - row, column + columns // 2
    elif row >= rows:
        row, column = 2 * rows - 1 - row, column + columns // 2
    return image[row, column % columns].astype(np.float64)


def triangle_resize(image, height, width):
    rows, columns = image.shape[:2]
    result = np.zeros((height, width, 3))
    for (i, j), _ in np.ndenumerate(np.zeros((height, width))):
        total = 0.0
        scale_y, scale_x = max(rows / height, 1), max(columns / width, 1)
        y, x = (i + 0.5) * rows / height, (j + 0.5) * columns / width
        for row in range(int(np.floor(y - scale_y)) - 1, int(np.ceil(y + scale_y)) + 1):
            for column in range(int(np.floor(x - scale_x)) - 1, int(np.ceil(x + scale_x)) + 1):
                weight = max(0, 1 - abs(row + 0.5 - y) / scale_y) * max(0, 1 - abs(column + 0.5 - x) / scale_x)
                if weight > 0:
                    result[i, j] += weight * on_sphere(image, row, column)
                    total += weight
        result[i, j] /= total
    return result


@pytest.mark.parametrize(("rows", "height"), [(48, 16), (50, 16), (16, 40), (36, 32)])
def test_resize_equals_the_double_sum_on_the_sphere(rows, height):
    image = noise(rows, 2 * rows)
    expected = triangle_resize(image, height, 2 * height)
    # Two roundings to 8 bits, one after each axis.
    assert np.abs(resize_panorama(image, height, 2 * height) - expected).max() <= 1.01


def test_resize_commutes_with_turning():
    image = noise(64, 128)
    turned = resize_panorama(np.roll(image, 24, axis=1), 16, 32)
    assert np.array_equal(turned, np.roll(resize_panorama(image, 16, 32), 6, axis=1))


def test_resize_makes_no_dark_seam():
    white = np.full((60, 120, 3), 255, dtype=np.uint8)
    assert (resize_panorama(white, 32, 64) == 255).all()


def test_colour_survives_every_lossless_format(tmp_path):
    image = noise(40, 80)
    for suffix in (".png", ".bmp", ".tif", ".TIFF"):
        path = tmp_path / f"room{suffix}"
        cv2.imwrite(str(path), image[:, :, ::-1])
        assert np.array_equal(read_panorama(path), image)
        assert check_panorama(path) == (40, 80)


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = noise(40, 80)[:, :, 0]
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert np.array_equal(read_panorama(tmp_path / "grey.png"), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, suffix):
    grey = np.linspace(0, 65535, 40 * 80).reshape(40, 80).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"grey{suffix}"), grey)
    expected = np.rint(grey / 257.0)
    assert np.array_equal(read_panorama(tmp_path / f"grey{suffix}"), np.stack([expected] * 3, axis=-1))
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1)
    cv2.imwrite(str(tmp_path / f"colour{suffix}"), colour[:, :, ::-1])
    assert np.abs(read_panorama(tmp_path / f"colour{suffix}") - colour / 257.0).max() <= 1


def test_float_images_are_scaled(tmp_path):
    share = np.linspace(0, 1, 40 * 80, dtype=np.float32).reshape(40, 80)
    for factor in (1.0, 7.5):
        Image.fromarray(share * np.float32(factor)).save(tmp_path / "float.tif")
        assert np.abs(read_panorama(tmp_path / "float.tif")[:, :, 1] - share * 255).max() <= 0.51


def test_alpha_lies_over_neutral_grey(tmp_path):
    image = noise(40, 80)
    alpha = np.full((40, 80, 1), 255, dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 128
    cv2.imwrite(str(tmp_path / "alpha.png"), np.concatenate([image[:, :, ::-1], alpha], axis=-1))
    opacity = alpha / 255.0
    assert np.abs(read_panorama(tmp_path / "alpha.png") - (image * opacity + 128 * (1 - opacity))).max() <= 1


def test_palette_with_a_transparent_colour(tmp_path):
    indices = np.zeros((40, 80), dtype=np.uint8)
    indices[20:] = 1
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.save(tmp_path / "palette.png", transparency=0)
    read = read_panorama(tmp_path / "palette.png")
    assert (read[:20] == 128).all()
    assert (read[20:] == [200, 100, 50]).all()


def test_cmyk(tmp_path):
    Image.new("CMYK", (80, 40), (255, 0, 0, 0)).save(tmp_path / "print.tif")
    assert (read_panorama(tmp_path / "print.tif") == [0, 255, 255]).all()


UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_before_the_shape_is_judged(tmp_path, orientation):
    stored = noise(40, 80) if orientation <= 4 else noise(80, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_panorama(tmp_path / "turned.png"), UPRIGHT[orientation](stored))
    assert check_panorama(tmp_path / "turned.png") == (40, 80)


def test_folder_is_listed_by_name_without_hidden_files_and_others(tmp_path):
    for name in ("b.JPG", "a.png", "._a.png", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    (tmp_path / "inner.png").mkdir()
    (tmp_path / "inner.png" / "d.tif").touch()
    assert [path.name for path in find_panoramas(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
    assert [path.name for path in find_panoramas(tmp_path, recursive=True)] == ["a.png", "b.JPG", "c.webp", "d.tif"]
    assert find_panoramas(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no image; put images into it that end in \.jpg, \.jpeg, \.png"):
        find_panoramas(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist; give an image or a folder"):
        find_panoramas(tmp_path / "nowhere")


@pytest.mark.parametrize("action", [read_panorama, check_panorama])
@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (
            100,
            100,
            r"100 x 100 pixels \(1:1\).* over-under stereo pair, which is 100 x 50, .*50 columns left, 50 right",
        ),
        (300, 200, r"\(1.5:1\).*crop it to 300 x 150, .* pad it to 400 x 200 \(50 columns left, 50 right\)"),
        (800, 301, r"pad it to 800 x 400 \(49 rows above, 50 below\), else crop it to 602 x 301"),
        (203, 100, "is 203 x 100"),
    ],
)
def test_other_shapes_are_refused_with_numbers_to_crop_and_pad(tmp_path, action, width, height, sentence):
    Image.new("RGB", (width, height)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match=sentence):
        action(tmp_path / "photo.png")


@pytest.mark.parametrize(("width", "height"), [(401, 200), (1000, 502)])
def test_a_ratio_that_is_off_by_rounding_is_accepted(tmp_path, width, height):
    Image.new("RGB", (width, height)).save(tmp_path / "photo.png")
    assert read_panorama(tmp_path / "photo.png").shape == (height, width, 3)


@pytest.mark.parametrize("action", [read_panorama, check_panorama])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_file_that_was_cut_off_is_refused(tmp_path, action, suffix):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(noise(256, 512)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=r"cut\.\w+ (cannot be decoded .* damaged or cut off|is no image that can be read)"):
        action(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 40\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "room.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"room\.jpg is no image that can be read; valid are JPEG, PNG"):
        read_panorama(tmp_path / "room.jpg")


@pytest.mark.parametrize(("width", "height"), [(17000, 8500), (60000, 30000)])
def test_a_huge_header_is_refused_before_decoding(tmp_path, width, height):
    png_without_pixels(tmp_path / "bomb.png", width, height)
    with pytest.raises(InputError, match=r"bomb\.png is too large to decode safely .* at most 16384 x 8192"):
        check_panorama(tmp_path / "bomb.png")


def test_tiny_missing_and_folder(tmp_path):
    Image.new("RGB", (62, 31)).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match="only 62 x 31 pixels; a panorama needs at least 32 rows"):
        read_panorama(tmp_path / "tiny.png")
    with pytest.raises(InputError, match=r"none\.png does not exist"):
        read_panorama(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a folder, not an image"):
        read_panorama(tmp_path)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["b.jpg", "a.png"], ["b", "a"]),
        (["attic.jpg", "attic.png", "hall.png"], ["attic_jpg", "attic_png", "hall"]),
        (["Attic.jpg", "attic.png"], ["Attic_jpg", "attic_png"]),  # one file on a file system that ignores case
        (["attic.jpg", "attic.png", "attic_jpg.png"], ["attic_jpg_2", "attic_png", "attic_jpg"]),
        (["attic.jpg", "attic.JPG"], ["attic_jpg", "attic_JPG_2"]),
    ],
)
def test_files_of_one_stem_get_names_apart(files, names):
    assert name_apart(map(Path, files)) == dict(zip(names, map(Path, files), strict=True))
    assert list(name_apart(map(Path, files))) == names
