"""Photographs from outside: found in a folder, checked before they are decoded, and turned into 8-bit RGB.

What a file may hold and what becomes of it:

    grey, 1-bit, palette, CMYK, YCbCr   converted to RGB
    alpha                               laid over neutral grey (128), the least surprising filling of a tripod hole
    16-bit grey                         value / 257, so that 65535 becomes 255 (16-bit colour keeps its upper byte)
    32-bit integers                     as 16-bit where they fit, else divided by their largest value
    float                               [0, 1] becomes [0, 255]; where values exceed 1, divided by their largest value
    EXIF orientation                    applied, before the shape is judged

Only still-image decoders are tried, so that no file can start an interpreter (Pillow opens EPS with Ghostscript), and the
size in the header is held against a cap before a pixel is decoded.
Cost: one decoding; ``check_panorama`` decodes a JPEG at an eighth of its size, which still finds a file that was cut off.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.optional import require

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP")
MAX_PIXELS = 16384 * 8192
MIN_HEIGHT_PX = 32
RATIO_TOLERANCE = 0.005
FILLING = 128

_ORIENTATION_TAG = 0x0112


def find_panoramas(path: str | Path, recursive: bool = False) -> list[Path]:
    """List the images that ``path`` stands for: itself if it is a file, else those in the folder, sorted by name.

    Args:
        path: a file, of any suffix, or a folder.
        recursive: look into the folders within the folder too.

    Raises:
        InputError: if ``path`` does not exist, or is a folder without images.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} does not exist; give an image or a folder of images ({', '.join(SUFFIXES)})")
    try:
        candidates = sorted(path.rglob("*") if recursive else path.iterdir())
    except OSError as error:
        raise InputError(f"the folder {path} cannot be listed ({error.strerror}); give one that this user can read") from error
    # Names with a leading dot are other programs' remains, such as the "._room.jpg" that macOS leaves on foreign disks.
    found = [file for file in candidates if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()]
    if not found:
        raise InputError(f"the folder {path} holds no image; put images into it that end in {', '.join(SUFFIXES)}")
    return found


def name_apart(paths: Iterable[Path]) -> dict[str, Path]:
    """Name each file by its stem, in their order; where stems are the same, by stem and suffix: ``attic_jpg``, ``attic_png``.

    Case does not tell two names apart, since it does not on every file system.
    """
    paths = list(paths)
    stems = Counter(path.stem.lower() for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    # What keeps its stem comes first, so that no other file takes that name away.
    for path in sorted(paths, key=lambda path: stems[path.stem.lower()] > 1):
        plain = path.stem if stems[path.stem.lower()] == 1 else f"{path.stem}_{path.suffix[1:]}"
        names[path] = next(name for name in _numbered(plain) if name.lower() not in taken)
        taken.add(names[path].lower())
    return {names[path]: path for path in paths}


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def read_panorama(path: str | Path) -> NDArray[np.uint8]:
    """Read a 360 x 180 degree photograph, upright, as ``(height, width, 3)`` RGB.

    Raises:
        InputError: if the file is missing, unreadable, cut off, too large, too small, or not 2:1 within 0.5 %.
    """
    with opened_panorama(path) as image:
        return _to_rgb(require("PIL.ImageOps").exif_transpose(image))


def check_panorama(path: str | Path) -> tuple[int, int]:
    """Make sure that ``read_panorama`` will succeed, at a fraction of its cost for a JPEG.

    Returns:
        Height and width in pixels, upright.

    Raises:
        InputError: as ``read_panorama`` does.
    """
    with opened_panorama(path) as image:
        width, height = _upright_size(image)
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
        return height, width


def resize_panorama(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize ``(H, W, 3)`` to ``(height, width, 3)`` with an antialiasing triangle filter that knows the sphere.

    The filter reads across the left and right edge, where the panorama goes on, and over the poles, where the next row is
    the mirrored one half a turn away: no seam arises. It is as wide as two output pixels, or two input pixels when it enlarges.
    """
    pillow = require("PIL.Image")
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    over_pole = min(rows, int(np.ceil(max(rows / height, 1.0))) + 1)
    over_seam = min(columns, int(np.ceil(max(columns / width, 1.0))) + 1)
    opposite = np.roll(image, columns // 2, axis=1)
    padded = np.concatenate([opposite[:over_pole][::-1], image, opposite[-over_pole:][::-1]])
    padded = np.concatenate([padded[:, -over_seam:], padded, padded[:, :over_seam]], axis=1)
    box = (over_seam, over_pole, over_seam + columns, over_pole + rows)
    resized = pillow.fromarray(padded).resize((width, height), resample=pillow.Resampling.BILINEAR, box=box)
    return np.asarray(resized, dtype=np.uint8)


@contextmanager
def opened_panorama(path: str | Path) -> Iterator[Any]:
    """Open an image whose header has passed every check, and turn whatever its decoder raises into a sentence."""
    path = Path(path)
    pillow = require("PIL.Image")
    if not path.exists():
        raise InputError(f"the image {path} does not exist; give the path of an image ({', '.join(SUFFIXES)})")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an image; give one of the images in it")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images and of odd metadata; the cap below decides instead.
            warnings.simplefilter("ignore")
            with pillow.open(path, formats=FORMATS) as image:
                _check_header(path, image)
                yield image
    except (InputError, ImportError):
        raise
    except pillow.DecompressionBombError as error:
        raise InputError(_too_large(path, str(error))) from error
    except pillow.UnidentifiedImageError as error:
        raise InputError(
            f"{path} is no image that can be read; valid are {', '.join(FORMATS)} files: convert it, or leave it out"
        ) from error
    except PermissionError as error:
        raise InputError(f"the image {path} cannot be read ({error.strerror}); give this user the right to read it") from error
    except Exception as error:  # damaged files make decoders raise OSError, SyntaxError, struct.error, zlib.error, KeyError ...
        raise InputError(
            f"the image {path} cannot be decoded ({error}); it is damaged or cut off: copy or export it again"
        ) from error


def _check_header(path: Path, image: Any) -> None:
    # The cap comes first: asking a PNG for its EXIF data already decodes it.
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(path, f"{image.width} x {image.height} pixels"))
    width, height = _upright_size(image)
    if height < MIN_HEIGHT_PX:
        raise InputError(
            f"{path} is only {width} x {height} pixels; a panorama needs at least {MIN_HEIGHT_PX} rows: give a larger one"
        )
    if abs(width / (2 * height) - 1) > RATIO_TOLERANCE:
        raise InputError(_not_two_to_one(path, width, height))


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    quarter_turned = image.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8)
    return (height, width) if quarter_turned else (width, height)


def _too_large(path: Path, size: str) -> str:
    return (
        f"{path} is too large to decode safely ({size}); valid are at most 16384 x 8192: reduce it first, 4096 x 2048 is plenty"
    )


def _not_two_to_one(path: Path, width: int, height: int) -> str:
    given = f"{path} is {width} x {height} pixels ({width / height:.3g}:1), but a 360-degree panorama is 2:1; "
    half_width = width // 2
    if width > 2 * height:
        above = (half_width - height) // 2
        return (
            f"{given}if it shows the full turn, pad it to {2 * half_width} x {half_width} "
            f"({above} rows above, {half_width - height - above} below), else crop it to {2 * height} x {height}"
        )
    if width == height:
        crop = f"keep one half of an over-under stereo pair, which is {2 * half_width} x {half_width}"
    else:
        crop = f"crop it to {2 * half_width} x {half_width}"
    left = (2 * height - width) // 2
    return (
        f"{given}{crop}, or, if it shows less than the full turn, pad it to {2 * height} x {height} "
        f"({left} columns left, {2 * height - width - left} right)"
    )


def _to_rgb(image: Any) -> NDArray[np.uint8]:
    if image.mode.startswith(("I", "F")):
        return _scaled_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = require("PIL.Image").new("RGBA", image.size, (FILLING, FILLING, FILLING, 255))
        ground.alpha_composite(image)
        image = ground
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _scaled_to_rgb(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn one channel of 16-bit, 32-bit or float values into three equal channels of 8 bits, without clipping."""
    value = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    usual = 1.0 if values.dtype.kind == "f" else 65535.0
    largest = float(value.max())
    grey = np.clip(np.rint(value * (255.0 / (usual if largest <= usual else largest))), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)
