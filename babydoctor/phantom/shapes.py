"""Drawing primitives: soft-edged masks on a pixel grid and smooth noise.

``x`` points to the viewer's right and ``y`` down, both in [-1, 1] over the image. Masks and images are ``[S, S]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CANONICAL_SIZE = 84
"""The tiny tower's input size. Edges, rims and noise have the widths that they have in an image of this size."""


@dataclass(frozen=True)
class Grid:
    """Pixel centers of an ``S x S`` image: ``x`` is ``[1, S]``, ``y`` is ``[S, 1]``.

    ``pixel`` is the width of a pixel of a canonical image, so a phantom is the same picture at every size. Smaller
    images than that use their own pixels, because thinner edges would alias.
    """

    x: np.ndarray
    y: np.ndarray
    pixel: float

    @property
    def size(self) -> int:
        return self.x.shape[1]


@lru_cache(maxsize=4)
def build_grid(size: int) -> Grid:
    """The pixel centers of an image with ``size`` pixels a side."""
    centers = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    return Grid(x=centers[None, :], y=centers[:, None], pixel=2.0 / min(size, CANONICAL_SIZE))


@lru_cache(maxsize=32)
def _interpolation(size: int, knots: int) -> np.ndarray:
    """Linear interpolation from ``knots`` values to ``size`` pixels, ``[S, K]``."""
    position = np.linspace(0, knots - 1, size)
    weights = 1 - np.abs(position[:, None] - np.arange(knots)[None, :])
    return np.clip(weights, 0, 1).astype(np.float32)


def _stretch(knots: np.ndarray, size: int) -> np.ndarray:
    """Interpolate a field of knots ``[R, C]`` to an image ``[S, S]``."""
    rows, columns = knots.shape
    return _interpolation(size, rows) @ knots.astype(np.float32) @ _interpolation(size, columns).T


def smooth_noise(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """A smooth random field ``[S, S]`` with unit variance at its ``rows x columns`` knots."""
    return _stretch(rng.standard_normal((rows, columns)), size)


def grain(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise ``[S, S]`` with the grain of a canonical image's pixels."""
    return smooth_noise(rng, size, CANONICAL_SIZE, CANONICAL_SIZE)


def speckle(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """Speckle ``[S, S]``: the magnitude of complex noise at ``rows x columns`` knots."""
    return _stretch(np.hypot(*rng.standard_normal((2, rows, columns))), size)


def ellipse(
    grid: Grid, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, soft: float = 1.0
) -> np.ndarray:
    """Mask ``[S, S]`` of a filled ellipse with an edge of ``soft`` canonical pixels; ``angle``: radians, clockwise."""
    dx, dy = grid.x - cx, grid.y - cy
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (dx * cos + dy * sin) / rx, (dy * cos - dx * sin) / ry
    distance = (1 - np.sqrt(u * u + v * v)) * min(rx, ry)
    return np.clip(distance / (soft * grid.pixel) + 0.5, 0, 1)


def bar(grid: Grid, cx: float, cy: float, length: float, width: float, angle: float, soft: float = 1.0) -> np.ndarray:
    """Mask ``[S, S]`` of a straight bar. ``angle`` is in radians, clockwise."""
    dx, dy = grid.x - cx, grid.y - cy
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = np.abs(dx * cos + dy * sin) - length / 2, np.abs(dy * cos - dx * sin) - width / 2
    return np.clip(-np.maximum(u, v) / (soft * grid.pixel) + 0.5, 0, 1)


def blend(image: np.ndarray, mask: np.ndarray, value: float | np.ndarray) -> np.ndarray:
    """Paint ``value`` over ``image`` where ``mask`` is 1."""
    return image + mask * (value - image)
