"""Tiles of noise with prescribed spectra, and their look-up at the scale of a pixel.

A tile is white noise filtered to a radial power law (optionally stretched, or folded into ridges), made once from a fixed
seed. It is kept in halved copies; a pixel reads the copy whose cells are about as large as the pixel's footprint, so that
distant surfaces turn even instead of sparkling. Cost of a look-up: about 15 passes over the pixels.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

TILE = 256
LEVELS = 8
# name: exponent of the radial spectrum, stretch along u, longest wavelength as a share of the tile, folded into ridges
NOISES: dict[str, tuple[float, float, float, bool]] = {
    "cloud": (1.7, 1.0, 0.35, False),
    "grain": (0.3, 1.0, 0.10, False),
    "streak": (1.2, 12.0, 0.30, False),
    "vein": (2.0, 1.0, 0.35, True),
}
LEVEL_START = np.cumsum([0] + [(TILE >> level) ** 2 for level in range(LEVELS - 1)]).astype(np.int32)


@cache
def noise_tile(name: str) -> Float32:
    """Return a tile of mean 0 and deviation 1 and its halved copies, one after the other in a flat, read-only array."""
    exponent, stretch, longest, ridged = NOISES[name]
    generator = np.random.Generator(np.random.PCG64([7, sorted(NOISES).index(name)]))
    frequency = np.fft.fftfreq(TILE) * TILE
    radius = np.hypot(frequency[None, :] * stretch, frequency[:, None])
    amplitude = np.where(radius * longest < 1.0, 0.0, np.maximum(radius, 1.0) ** -exponent)
    values = np.fft.ifft2(np.fft.fft2(generator.standard_normal((TILE, TILE))) * amplitude).real
    if ridged:
        values = np.exp(-8.0 * np.abs(values) / values.std())
    values = (values - values.mean()) / values.std()
    levels = []
    for _ in range(LEVELS):
        levels.append(values.ravel())
        values = values.reshape(values.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3))
    tile = np.concatenate(levels).astype(np.float32)
    tile.setflags(write=False)
    return tile


def noise(name: str, u: Float32, v: Float32, footprint_m: Float32, cell_m: float) -> Float32:
    """Return noise at surface coordinates.

    Args:
        name: a key of ``NOISES``.
        u: coordinate in metres, as ``v``; above -65536 cells.
        footprint_m: size of each pixel on the surface.
        cell_m: size of the finest detail; the tile repeats after 256 of them.
    """
    tile = noise_tile(name)
    level = np.frexp(footprint_m * (0.7 / cell_m))[1]
    np.minimum(np.maximum(level, 0, out=level), LEVELS - 1, out=level)
    x = (u * (1.0 / cell_m) + 65536.0).astype(np.int32)
    y = (v * (1.0 / cell_m) + 65536.0).astype(np.int32)
    x &= TILE - 1
    y &= TILE - 1
    x >>= level
    y >>= level
    y <<= 8 - level
    y += x
    y += LEVEL_START.take(level)
    return tile.take(y)


def scatter(i: npt.NDArray[np.int32], j: npt.NDArray[np.int32]) -> Float32:
    """Return one fixed normal number for every pair of whole numbers."""
    index = i * 7919
    index += j * 104729
    index ^= index >> 7
    index &= TILE * TILE - 1
    return noise_tile("grain").take(index)
