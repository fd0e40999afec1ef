"""From light to a photograph: exposure, white balance, sensor noise, tone curve, tripod patch; and what a depth sensor misses.

The sensor works on the square root of the light, in which shot noise is even (Anscombe, 1948), so that noise that depends on
the signal is one number. Tone curve, gamma and rounding are one table of 2,048 entries. Outlines are smoothed where the
surface changes, as a lens and a reduction in size would do.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

CURVE_ENTRIES = 2048
CURVE_TOP = 1.5  # square root of the brightest light that the table tells apart
TRIPOD_KINDS = ("none", "disc", "blur", "ring", "legs")
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)


@dataclass(frozen=True)
class Photography:
    """How a picture is taken.

    Attributes:
        key: brightness that the middle light of the scene is brought to, before the curve.
        balance: gains of red, green and blue.
        contrast: strength of the S-curve.
        shoulder: how early highlights are compressed; 0 clips them.
        noise: deviation of the square root of the light.
        flare: share of the mean light that veils everything.
        softness: share of each pixel that comes from its neighbours.
        tripod: one of ``TRIPOD_KINDS``.
        tripod_rad: angular radius of the patch around the nadir.
        tripod_colour: its colour.
        range_m: farthest depth the sensor measures.
        dropout: how many of the dark and the mirroring patches the sensor misses.
    """

    key: float
    balance: tuple[float, float, float]
    contrast: float
    shoulder: float
    noise: float
    flare: float
    softness: float
    tripod: str
    tripod_rad: float
    tripod_colour: tuple[float, float, float]
    range_m: float
    dropout: float


def draw_photography(generator: np.random.Generator) -> Photography:
    """Draw how a picture is taken."""
    draw = generator.random(13).tolist()
    warmth, tint = 0.12 * (draw[1] - 0.5), 0.06 * (draw[2] - 0.5)
    grey = 0.02 + 0.8 * draw[9] ** 2
    return Photography(
        key=0.12 + 0.38 * draw[0],
        balance=(1.0 + warmth, 1.0 + tint, 1.0 - warmth),
        contrast=0.5 * draw[3],
        shoulder=draw[4],
        noise=0.022 * draw[5] ** 2,
        flare=0.04 * draw[6],
        softness=0.5 * draw[7],
        tripod=TRIPOD_KINDS[int(generator.choice(len(TRIPOD_KINDS), p=[0.6, 0.08, 0.17, 0.03, 0.12]))],
        tripod_rad=float(np.radians(5.0 + 13.0 * draw[8])),
        tripod_colour=(grey, grey, grey),
        range_m=4.5 + 6.0 * draw[10] if draw[11] < 0.12 else 100.0,
        dropout=1.0 if draw[12] < 0.3 else 0.0,
    )


def tone_curve(photography: Photography) -> npt.NDArray[np.uint8]:
    """Return the table from the square root of light, in steps of ``CURVE_TOP / CURVE_ENTRIES``, to sRGB."""
    light = (np.linspace(0.0, CURVE_TOP, CURVE_ENTRIES)) ** 2
    bent = photography.shoulder
    light = (1.0 - bent) * np.minimum(light, 1.0) + bent * (1.0 - np.exp(-1.6 * light)) / (1.0 - np.exp(-1.6 * CURVE_TOP**2))
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
    srgb = (1.0 - photography.contrast) * srgb + photography.contrast * srgb * srgb * (3.0 - 2.0 * srgb)
    return np.asarray(np.clip(srgb * 255.0 + 0.5, 0, 255)).astype(np.uint8)


def expose(light: Float32, photography: Photography) -> Float32:
    """Scale light, in place, so that its middle over the sphere is the photograph's key, then balance and veil it."""
    height = light.shape[1]
    step = max(1, height // 32)
    sample = np.tensordot(LUMA.astype(np.float64), light[:, step // 2 :: step, step // 2 :: step].astype(np.float64), axes=1)
    sample = np.sort(sample[4:-4].ravel())
    # Between the median and the brighter part, as meters do, so that a dark room stays darker than a white one.
    middle = float(0.5 * sample[sample.size // 2] + 0.25 * sample[int(0.9 * sample.size)] + 0.05)
    gain = photography.key / middle
    veil = photography.flare * photography.key
    for channel in range(3):
        light[channel] *= gain * photography.balance[channel]
        light[channel] += veil
    return light


def smooth_outlines(light: Float32, labels: npt.NDArray[np.int32], softness: float) -> None:
    """Blend each pixel, in place, with its eight neighbours: fully on outlines, by ``softness`` elsewhere."""
    edge = np.zeros(labels.shape, dtype=bool)
    vertical = labels[1:] != labels[:-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    horizontal = labels != np.roll(labels, 1, axis=1)
    edge |= horizontal
    edge |= np.roll(horizontal, -1, axis=1)
    share = np.where(edge, np.float32(1.0), np.float32(softness))
    for channel in range(3):
        image = np.minimum(light[channel], 1.6)
        blurred = image * 2.0
        blurred[:, 1:] += image[:, :-1]
        blurred[:, 0] += image[:, -1]
        blurred[:, :-1] += image[:, 1:]
        blurred[:, -1] += image[:, 0]
        both = blurred * 2.0
        both[1:] += blurred[:-1]
        both[0] += blurred[0]
        both[:-1] += blurred[1:]
        both[-1] += blurred[-1]
        both *= 1.0 / 16.0
        both -= image
        both *= share
        np.add(image, both, out=light[channel])


def cover_tripod(light: Float32, down: Float32, level: Float32, photography: Photography) -> npt.NDArray[np.bool_]:
    """Paint the tripod's patch, in place.

    Args:
        down: ``(H, W)`` cosine of each pixel's angle from the nadir.
        level: ``(2, H, W)`` horizontal part of each pixel's direction.

    Returns:
        the pixels it covers.
    """
    if photography.tripod == "none":
        return np.zeros(down.shape, dtype=bool)
    covered = down > np.cos(photography.tripod_rad)
    if photography.tripod == "legs":
        azimuth = np.arctan2(level[1], level[0])
        covered &= (np.cos(3.0 * azimuth + 10.0 * photography.key) > 0.93) | (down > np.cos(0.35 * photography.tripod_rad))
    if not covered.any():
        return covered
    colour = np.array(photography.tripod_colour, dtype=np.float32)
    if photography.tripod == "blur":
        colour = light[:, covered].mean(axis=1)
    light[:, covered] = colour[:, None]
    if photography.tripod == "ring":
        ring = covered & (down < np.cos(0.7 * photography.tripod_rad)) & (down > np.cos(0.85 * photography.tripod_rad))
        light[:, ring] = 0.9 - 0.8 * colour[:, None]
    return covered


def develop(light: Float32, photography: Photography, sensor: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return the photograph, ``(H, W, 3)``."""
    root = np.sqrt(light)
    if photography.noise > 0.0:
        noise = sensor.standard_normal(light.shape, dtype=np.float32)
        noise *= photography.noise
        root += noise
    root *= (CURVE_ENTRIES - 1) / CURVE_TOP
    np.clip(root, 0, CURVE_ENTRIES - 1, out=root)
    pixels = tone_curve(photography).take(root.astype(np.int16))
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
