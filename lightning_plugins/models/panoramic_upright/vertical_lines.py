"""Up from the vertical lines of a panorama: the classical baseline, which needs no training.

    1. segments   OpenCV's line segment detector (LSD) on six overlapping gnomonic views, where straight edges stay straight
    2. normals    a segment from direction a to b lies on the great circle of normal n = a x b / |a x b|
    3. vote       RANSAC: vertical lines have n . up = 0, so that the cross product of two normals is a candidate for up
    4. refine     up = argmin of sum_i w_i (n_i . up)^2, the eigenvector of the smallest eigenvalue, reweighted ITERATIONS times

With e the error of a segment's ends across it, p how far edges are off plumb, m the segment's middle, t = n x m its run and L its
angle, all as the camera sees them, the n . up of a vertical segment has the variance

    s^2 = e^2 ((m . up)^2 / 2 + 2 (t . up)^2 / L^2) + p^2

and that of a segment which runs anyhow through m the density 1 / (pi |t . up|), which grows as m nears up or down: a segment
beside the zenith meets it by chance. The ratio of the two densities, times the odds that a segment is vertical at all, gives the
vote, sum_i c_i log(1 + odds_i), and the weight, w_i = c_i odds_i / (1 + odds_i) / s_i^2. Pieces of one edge, the two sides of a
frame, and an edge seen in two views are no independent witnesses: c_i is 1 over how many segments lie on the same great circle,
within SAME_LINE_DEG.

Lines have no arrow, and a room's three directions look alike to them. Up is therefore looked for within ``max_tilt_deg`` of the
image's +z: below 90 degrees this settles the sign, and up to 45 it leaves at most one of three directions at right angles, or
two on its border. A camera that hung upside down gets minus up, and one that lay on its side a horizontal direction.

Detector: Grompone von Gioi et al., "LSD: a Line Segment Detector", IPOL 2012. Consensus: Fischler and Bolles, CACM 1981, with the
likelihood as vote as in MLESAC, Torr and Zisserman, CVIU 2000. We look for the one vertical direction instead of three at right
angles, since streets and rooms may have many horizontal ones.
Cost: LSD on six views, together 2.5 times the pixels of the image, and CANDIDATES x segments odds.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_plugins._support.errors import InputError
from lightning_plugins._support.optional import require
from lightning_plugins.engines.sphere import limit_longitude_band, resize_equirectangular, sample_equirectangular

MIN_HEIGHT_PX = 64
MAX_HEIGHT_PX = 512
# More than the 90 degrees of a cube's face, so that an edge on the border of one is whole in another.
VIEW_ANGLE_DEG = 110.0
# Against sensor noise, whose grain is tall and narrow off the equator and so passes for vertical lines.
BLUR_PX = 0.8
MIN_LENGTH_PX = 8.0
END_ERROR_PX = 0.25
PLUMB_ERROR_DEG = 0.3
SAME_LINE_DEG = 3.0
VERTICAL_SHARE = 0.3
CANDIDATES = 1000
ITERATIONS = 10
# A log likelihood ratio. Chance exceeds it once in exp(10) tries or less, and CANDIDATES tries once in 22.
MIN_EVIDENCE = 10.0
MIN_LINES = 4
MAX_SIGMA_DEG = 5.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinesEstimate:
    """Where up is, and how far the lines can be trusted.

    Attributes:
        up: ``(3,)`` float32 unit vector in the image's frame (z up); ``rotation_from_up(up)`` levels the image.
        angle_sigma_deg: standard deviation of its angle, given that the lines which meet in it are the vertical ones.
        support: length of these lines over that of all segments near enough to vertical to be looked at, in [0, 1].
        line_count: how many they are, each great circle counted once.
    """

    up: Tensor
    angle_sigma_deg: float
    support: float
    line_count: int


@dataclass(frozen=True)
class Segments:
    """N straight edges on the sphere.

    Attributes:
        normal, middle, run: ``(N, 3)``, three unit vectors at right angles: of the great circle, to the middle, and along.
        angle_rad: ``(N,)``, from end to end.
        count: ``(N,)``, 1 over how many of them lie on the same great circle; the sum is the number of lines.
    """

    normal: Array
    middle: Array
    run: Array
    angle_rad: Array
    count: Array

    def __getitem__(self, index: Any) -> "Segments":
        return Segments(self.normal[index], self.middle[index], self.run[index], self.angle_rad[index], self.count[index])

    def __len__(self) -> int:
        return len(self.normal)


def estimate_up_from_lines(image: Tensor, max_tilt_deg: float = 45.0, seed: int = 0) -> LinesEstimate | None:
    """Return the direction in which the vertical lines of a panorama meet, or None where there is no such cue.

    Args:
        image: ``(1, H, 2 H)`` or ``(3, H, 2 H)``, floats in [0, 1] or uint8, of 64 rows or more.
        max_tilt_deg: how far from the image's +z up may lie, in (0, 90]; the less, the fewer horizontal directions are taken
            for it. At 90 the sign stays open, and the answer is the one with z >= 0.
        seed: of the vote; the same seed gives the same estimate.

    Raises:
        InputError: if the image is no such image, or the angle out of range.
        PackageError: if OpenCV is not installed.
    """
    if (
        image.ndim != 3
        or len(image) not in (1, 3)
        or not (image.is_floating_point() or image.dtype == torch.uint8)
        or image.shape[1] < MIN_HEIGHT_PX
        or image.shape[2] != 2 * image.shape[1]
    ):
        raise InputError(
            f"image must be (1 or 3, H, 2 H) of floats in [0, 1] or uint8, with H {MIN_HEIGHT_PX} or more, "
            f"got {tuple(image.shape)} of {image.dtype}; crop, pad or enlarge it"
        )
    if not 0.0 < max_tilt_deg <= 90.0:
        raise InputError(f"max_tilt_deg must be above 0 and at most 90, got {max_tilt_deg}; 45 leaves one direction of a room")
    grey = image.detach().cpu().float().mean(dim=0)[None, None]
    if image.dtype == torch.uint8:
        grey = grey / 255
    if image.shape[1] > MAX_HEIGHT_PX:
        grey = resize_equirectangular(grey, MAX_HEIGHT_PX, 2 * MAX_HEIGHT_PX)
    segments = find_segments(limit_longitude_band(grey)[0, 0])
    # The normal of a vertical line is no farther from the horizon than up is from +z.
    reach_deg = min(90.0, max_tilt_deg + PLUMB_ERROR_DEG)
    segments = segments[np.abs(segments.normal[:, 2]) <= math.sin(math.radians(reach_deg))]
    if len(segments) < MIN_LINES:
        return None
    error_rad = END_ERROR_PX * math.pi / grey.shape[2]
    up = _vote(segments, error_rad, max_tilt_deg, np.random.default_rng(seed))
    return None if up is None else _refine(segments, error_rad, up)


def find_segments(grey: Tensor) -> Segments:
    """Return the straight edges of an equirectangular image ``(H, 2 H)`` in [0, 1]; where two views overlap they come twice.

    Raises:
        PackageError: if OpenCV is not installed.
    """
    cv2 = require("cv2")
    detector = cv2.createLineSegmentDetector(scale=1.0)
    focal_px = len(grey) / math.pi
    half_px = round(focal_px * math.tan(math.radians(VIEW_ANGLE_DEG / 2)))
    offset = (torch.arange(2 * half_px) + 0.5 - half_px) / focal_px
    down, across = torch.meshgrid(offset, offset, indexing="ij")
    ends = [np.zeros((0, 2, 3))]
    for axis in range(3):
        for side in (1.0, -1.0):
            # Columns and rows of a view run along the two axes that follow its own; mirrored or not, a line is a line.
            rays = torch.stack((torch.full_like(across, side), across, down), dim=-1).roll(axis, dims=-1)
            view = sample_equirectangular(grey[None, None], rays)[0, 0].clamp(0, 1)
            smooth = cv2.GaussianBlur((view * 255).round().byte().numpy(), (0, 0), BLUR_PX)
            found = detector.detect(smooth)[0]
            if found is not None:
                plane = (found.reshape(-1, 2, 2).astype(np.float64) + 0.5 - half_px) / focal_px
                ends.append(np.roll(np.insert(plane, 0, side, axis=2), axis, axis=2))
    a, b = _unit(np.concatenate(ends)).swapaxes(0, 1)
    cross = np.cross(a, b)
    angle_rad = np.arctan2(np.linalg.norm(cross, axis=1), (a * b).sum(axis=1))
    is_long = angle_rad >= MIN_LENGTH_PX / focal_px
    normal, middle = _unit(cross[is_long]), _unit((a + b)[is_long])
    is_same = np.abs(normal @ normal.T) > math.cos(math.radians(SAME_LINE_DEG))
    return Segments(normal, middle, np.cross(normal, middle), angle_rad[is_long], 1 / is_same.sum(axis=1))


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _odds(segments: Segments, up: Array, error_rad: float) -> tuple[Array, Array]:
    """Return the odds that each segment is vertical, and its variance of n . up, for candidates ``(K, 3)``: each ``(K, N)``."""
    residual, along_middle, along_run = (up @ axis.T for axis in (segments.normal, segments.middle, segments.run))
    ends = along_middle**2 / 2 + 2 * along_run**2 / segments.angle_rad**2
    variance = error_rad**2 * ends + math.radians(PLUMB_ERROR_DEG) ** 2
    ratio = np.exp(-(residual**2) / (2 * variance)) / np.sqrt(2 * math.pi * variance) * math.pi * np.abs(along_run)
    return VERTICAL_SHARE / (1 - VERTICAL_SHARE) * ratio, variance


def _vote(segments: Segments, error_rad: float, max_tilt_deg: float, generator: np.random.Generator) -> Array | None:
    """Return the likeliest candidate, with z >= 0; None if none lies within the tilt, or if chance explains the lines as well."""
    share = segments.angle_rad / segments.angle_rad.sum()
    first, second = generator.choice(len(segments), size=(2, CANDIDATES), p=share)
    cross = np.cross(segments.normal[first], segments.normal[second])
    # One line twice, or two on one great circle, leave open where they meet.
    candidates = _unit(cross[np.linalg.norm(cross, axis=1) > 0.05])
    candidates *= np.where(candidates[:, 2:] < 0, -1.0, 1.0)
    candidates = candidates[candidates[:, 2] >= math.cos(math.radians(max_tilt_deg))]
    if len(candidates) == 0:
        return None
    odds, _ = _odds(segments, candidates, error_rad)
    evidence = np.log((1 - VERTICAL_SHARE) * (1 + odds)) @ segments.count
    best: Array = candidates[evidence.argmax()]
    return best if evidence.max() >= MIN_EVIDENCE else None


def _refine(segments: Segments, error_rad: float, up: Array) -> LinesEstimate | None:
    for _ in range(ITERATIONS):
        odds, variance = (values[0] for values in _odds(segments, up[None], error_rad))
        probability = odds / (1 + odds)
        weighted = segments.normal * (segments.count * probability / variance)[:, None]
        eigenvalues, eigenvectors = np.linalg.eigh(weighted.T @ segments.normal)
        up = eigenvectors[:, 0] * (-1.0 if eigenvectors[2, 0] < 0 else 1.0)
    count = round(segments.count[probability > 0.5].sum())
    if count < MIN_LINES:
        return None
    # Where the lines agree better than assumed, that may be chance; where worse, the assumption was too good.
    excess = max(1.0, eigenvalues[0] / (count - 2))
    sigma_deg = math.degrees(math.sqrt(excess * (1 / eigenvalues[1] + 1 / eigenvalues[2])))
    # Lines on nearly the same great circle do not say where on it up is.
    if sigma_deg > MAX_SIGMA_DEG:
        return None
    support = float((probability * segments.angle_rad).sum() / segments.angle_rad.sum())
    return LinesEstimate(torch.from_numpy(up).float(), sigma_deg, support, count)
