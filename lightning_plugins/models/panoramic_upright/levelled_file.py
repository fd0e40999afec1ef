"""Levelling of a photograph's file, given its up-vector: new pixels, or new tags around the old ones.

    level pixels = tilted pixels turned by R = rotation_from_up(up)          pose of the new file: pitch = roll = 0
    R = Rz(-yaw) Ry(-pitch) Rx(roll)                                         the order of engines.sphere.pose
    new heading  = old heading - yaw

The smallest rotation also moves the centre of the tilted image, yaw degrees to the right of the new centre; so the new centre
looks yaw degrees to the left of the old one. The old heading is the compass direction of the old centre, whatever pitch and roll
stand beside it: those are the camera's sensor's, and give way to the estimate, which was made from the pixels.
A file without a heading gets none. EXIF's own image direction (GPSImgDirection) stays as it was.

With ``tags_only`` the pixels stay, and the estimate's pitch and roll go into the tags; a viewer that reads them levels the image.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins._support.atomic import atomic_write
from lightning_plugins._support.errors import InputError
from lightning_plugins._support.images import RATIO_TOLERANCE, check_panorama, read_panorama
from lightning_plugins._support.panorama_encoding import encode_panorama
from lightning_plugins._support.panorama_metadata import PanoramaMetadata, check_retagging, read_metadata, retag_panorama
from lightning_plugins.engines.sphere import pose_from_rotation, rotate_in_tiles, rotation_from_up, up_from_pose


@dataclass(frozen=True)
class LevelledFile:
    """What ``level_file`` did.

    Args:
        source: the tilted photograph.
        destination: the file written.
        skipped: whether the photograph was level already, and the destination is a copy of it, byte for byte.
        rotation: ``(3, 3)``, float64, level from tilted; with tags alone, what a viewer is asked to do.
        yaw_deg: where the centre of the tilted image comes to lie, to the right of the level one's centre.
        pitch_deg: how far above the horizon the tilted image's centre is.
        roll_deg: how far the camera was turned clockwise.
        tilt_deg: the angle of the rotation.
        heading_before_deg: compass direction of the centre as the source gives it, None if it does not.
        heading_after_deg: that of the destination's centre.
        kept: what of the source's metadata the destination holds.
        dropped: what it does not.
        notes: what else became of the photograph that its owner may want to know.
    """

    source: Path
    destination: Path
    skipped: bool
    rotation: Tensor
    yaw_deg: float
    pitch_deg: float
    roll_deg: float
    tilt_deg: float
    heading_before_deg: float | None
    heading_after_deg: float | None
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def level_file(
    source: str | Path,
    destination: str | Path,
    up: Tensor | Sequence[float],
    *,
    sigma_deg: float | None = None,
    tags_only: bool = False,
) -> LevelledFile:
    """Write a level copy of a photograph, at full resolution and with its metadata.

    Args:
        source: a 360 x 180 degree photograph, which is not touched: JPEG, PNG, TIFF, WEBP or BMP.
        destination: the file to write, with the source's suffix; written whole or not at all, over what is there.
        up: ``(3,)``, the up-vector in the photograph's frame, of any length but zero.
        sigma_deg: the estimate's uncertainty; a tilt below it counts as none, and leaves the file as it is.
        tags_only: change the pose in the tags instead of the pixels; for JPEG and PNG.

    Raises:
        InputError: if the photograph cannot be read, shows less than the full sphere, or has a format or an EXIF orientation
            that the tags alone cannot serve; or if the destination is the source, has another suffix or no folder; or if ``up``
            or ``sigma_deg`` is no number of its kind.
    """
    source, destination = Path(source), Path(destination)
    up = _checked_up(up)
    if sigma_deg is not None and not (math.isfinite(sigma_deg) and sigma_deg >= 0):
        raise InputError(f"sigma_deg must be 0 or more, got {sigma_deg}; None levels every photograph")
    _check_destination(source, destination)
    metadata = check_levelling(source, tags_only)
    rotation = rotation_from_up(up)
    yaw, pitch, roll = (float(angle) for angle in pose_from_rotation(rotation))
    tilt_deg = math.degrees(math.atan2(math.hypot(float(up[0]), float(up[1])), float(up[2])))
    skipped = sigma_deg is not None and tilt_deg < sigma_deg
    heading = _number(metadata.properties, "GPano:PoseHeadingDegrees")
    before = None if heading is None else heading % 360
    after = before if before is None or skipped or tags_only else (before - yaw) % 360
    notes = _notes_on_pose(metadata, up, skipped)
    if skipped:
        with atomic_write(destination) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)
        notes.insert(
            0, f"level already: its tilt of {tilt_deg:.2f} degrees is below the estimate's uncertainty of {sigma_deg:.2f}"
        )
    elif tags_only:
        pose = {"GPano:PosePitchDegrees": _degrees(pitch), "GPano:PoseRollDegrees": _degrees(roll)}
        _write(destination, retag_panorama(source, metadata, {**pose, **_heading_tag(after)}))
    else:
        pixels = _turned(source, metadata, rotation)
        notes += _notes_on_pixels(metadata)
        pose = {"GPano:PosePitchDegrees": "0", "GPano:PoseRollDegrees": "0"}
        _write(destination, encode_panorama(source, metadata, pixels, {**pose, **_heading_tag(after)}))
    return LevelledFile(
        source, destination, skipped, rotation, yaw, pitch, roll, tilt_deg, before, after,
        () if skipped else tuple(metadata.kept), () if skipped else tuple(metadata.dropped), tuple(notes),
    )  # fmt: skip


def check_levelling(source: str | Path, tags_only: bool = False) -> PanoramaMetadata:
    """Make sure that ``level_file`` will take a photograph, at a fraction of its cost; return the photograph's metadata.

    Args:
        source: the photograph.
        tags_only: whether its tags alone are to change.

    Raises:
        InputError: where ``level_file`` would refuse the photograph.
    """
    source = Path(source)
    _, width = check_panorama(source)
    metadata = read_metadata(source)
    _check_full_sphere(source, metadata.properties)
    if not tags_only and width % 2:
        raise InputError(
            f"{source} is {width} pixels wide, and an even number is needed, since the row beyond a pole lies half a turn away; "
            f"make it {width + 1} x {(width + 1) // 2}"
        )
    if tags_only:
        check_retagging(source, metadata)
    if tags_only and metadata.orientation != 1:
        raise InputError(
            f"the pose of {source} cannot be told by tags alone, since its EXIF orientation is {metadata.orientation} and "
            f"viewers differ in which they apply first; level the pixels instead, or turn the image upright"
        )
    return metadata


def _turned(source: Path, metadata: PanoramaMetadata, rotation: Tensor) -> NDArray[np.uint8]:
    pixels = read_panorama(source)
    if metadata.is_grey:
        pixels = pixels[:, :, :1]
    return rotate_in_tiles(pixels, rotation.float())


def _write(destination: Path, data: bytes) -> None:
    with atomic_write(destination) as file:
        file.write(data)


def _checked_up(up: Tensor | Sequence[float]) -> Tensor:
    vector = torch.as_tensor(up, dtype=torch.float64).detach().cpu()
    if vector.shape != (3,) or not vector.isfinite().all() or not vector.any():
        raise InputError(f"up must be three finite numbers that are not all 0, got {vector.tolist()}; level is (0, 0, 1)")
    return torch.nn.functional.normalize(vector, dim=0)


def _check_destination(source: Path, destination: Path) -> None:
    if destination.is_dir():
        raise InputError(f"{destination} is a folder; give the name of the file to write, such as {destination / source.name}")
    if not destination.parent.is_dir():
        raise InputError(f"the folder {destination.parent} does not exist; make it, or choose another")
    if destination.suffix.lower() != source.suffix.lower():
        raise InputError(
            f"{destination} must end in {source.suffix}, as its source does, whose format it keeps; "
            f"such as {destination.with_suffix(source.suffix)}"
        )
    if source.exists() and destination.exists() and source.samefile(destination):
        raise InputError(f"{destination} is the source itself, which is never written to; choose another name")


def _check_full_sphere(source: Path, properties: Mapping[str, str]) -> None:
    projection = properties.get("GPano:ProjectionType", "equirectangular")
    if projection.lower() != "equirectangular":
        raise InputError(f"{source} calls its projection {projection!r} in its tags; valid is equirectangular: convert it first")
    for axis in ("Width", "Height"):
        part = _number(properties, f"GPano:CroppedAreaImage{axis}Pixels")
        full = _number(properties, f"GPano:FullPano{axis}Pixels")
        if part is not None and full is not None and abs(part - full) > RATIO_TOLERANCE * full:
            raise InputError(
                f"{source} shows {part:g} of its panorama's {full:g} pixels of {axis.lower()}, by its tags, and only the full "
                f"sphere can be turned; pad it to the full size and correct the tags"
            )


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _degrees(value: float) -> str:
    return f"{round(value, 4) + 0.0:.4f}"


def _heading_tag(heading_deg: float | None) -> dict[str, str | None]:
    # Rounded, it may reach 360, which is 0. One that is no number is taken out.
    return {"GPano:PoseHeadingDegrees": None if heading_deg is None else _degrees(round(heading_deg, 4) % 360)}


def _notes_on_pose(metadata: PanoramaMetadata, up: Tensor, skipped: bool) -> list[str]:
    properties = metadata.properties
    notes = []
    heading = properties.get("GPano:PoseHeadingDegrees")
    if not skipped and heading is not None and _number(properties, "GPano:PoseHeadingDegrees") is None:
        notes.append(f"the heading in the tags is no number ({heading[:40]!r}) and was taken out")
    pitch, roll = (_number(properties, f"GPano:Pose{name}Degrees") for name in ("Pitch", "Roll"))
    if pitch or roll:
        own = up_from_pose(*(torch.tensor(angle or 0.0, dtype=torch.float64) for angle in (pitch, roll)))
        apart = math.degrees(float(torch.atan2(torch.linalg.cross(own, up).norm(), own @ up)))
        what = "a viewer that reads them still turns it" if skipped else f"the estimate, {apart:.1f} degrees away, replaced them"
        notes.append(f"the tags gave pitch {pitch or 0:g} and roll {roll or 0:g}; {what}")
    return notes


def _notes_on_pixels(metadata: PanoramaMetadata) -> list[str]:
    notes = []
    if metadata.bits > 8:
        notes.append(f"{metadata.bits} bits a channel became 8")
    if metadata.has_alpha:
        notes.append("transparent pixels were laid over grey")
    if metadata.mode in ("P", "PA"):
        notes.append("palette became RGB")
    elif not metadata.is_grey and metadata.mode not in ("RGB", "RGBA", "RGBa"):
        notes.append(f"{metadata.mode} became RGB")
    if metadata.orientation != 1:
        notes.append("the EXIF orientation was applied to the pixels")
    return notes
