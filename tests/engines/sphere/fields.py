"""Oracles in numpy and float64: band-limited functions on the sphere in closed form, and a bilinear reading of one direction.

A Legendre polynomial P_l(a . d) is a harmonic of degree l; its mean over a circle of radius rho about p is
P_l(cos rho) P_l(a . p) (Funk and Hecke), so that filters of rings have exact answers.
"""

import numpy as np
from numpy.polynomial.legendre import legval


def grid_directions(height, width):
    """Return directions (height, width, 3), written out from the convention: x forward, y left, z up."""
    colatitude = np.pi * (np.arange(height) + 0.5) / height
    longitude = 2 * np.pi * ((np.arange(width) + 0.5) / width - 0.5)
    colatitude, longitude = np.meshgrid(colatitude, longitude, indexing="ij")
    return np.stack(
        (np.sin(colatitude) * np.cos(longitude), -np.sin(colatitude) * np.sin(longitude), np.cos(colatitude)), axis=-1
    )


def random_rotation(seed):
    """Return a rotation matrix, uniformly distributed."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


class BandLimited:
    """A random sum of harmonics of degree 0 to ``degree``, scaled to lie within [-1, 1] or close to it."""

    def __init__(self, degree, seed=0, terms=3):
        random = np.random.default_rng(seed)
        self.axes = random.normal(size=(terms, 3))
        self.axes /= np.linalg.norm(self.axes, axis=1, keepdims=True)
        self.coefficients = random.normal(size=(degree + 1, terms))
        self.coefficients /= np.abs(self(grid_directions(64, 128))).max()

    def __call__(self, directions):
        return self.filtered(directions, np.ones(len(self.coefficients)))

    def filtered(self, directions, gains):
        """Return the field with degree l multiplied by ``gains[l]``, at directions (..., 3)."""
        cosine = np.clip(directions @ self.axes.T, -1, 1)
        return sum(legval(cosine[..., t], gains * self.coefficients[:, t]) for t in range(len(self.axes)))


def ring_gains(degree, weights, radii):
    """Return the gain of each degree under ``sum_r weights[r] * mean over the circle of radii[r]``."""
    polynomials = np.eye(degree + 1)
    return sum(w * np.array([legval(np.cos(r), p) for p in polynomials]) for w, r in zip(weights, radii, strict=True))


def read_bilinear(image, direction):
    """Interpolate one value of image (H, W), walking over poles and seam one neighbour at a time."""
    height, width = image.shape
    x, y, z = direction / np.linalg.norm(direction)
    v = np.arccos(np.clip(z, -1, 1)) * height / np.pi - 0.5
    u = (np.arctan2(-y, x) / (2 * np.pi) + 0.5) * width - 0.5
    total = 0.0
    for row in (int(np.floor(v)), int(np.floor(v)) + 1):
        for column in (int(np.floor(u)), int(np.floor(u)) + 1):
            weight = (1 - abs(v - row)) * (1 - abs(u - column))
            over = row < 0 or row >= height
            inside = -1 - row if row < 0 else 2 * height - 1 - row if over else row
            total += weight * image[inside, (column + (width // 2 if over else 0)) % width]
    return total
