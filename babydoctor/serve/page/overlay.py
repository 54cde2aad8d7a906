"""Weights of an occlusion map -> words and transparent images to overlay. Pure functions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

MAX_EDGE = 512
"""Long edge of an overlay in pixels. Its content is as coarse as the model's patches."""

MAX_WORDS = 300
"""Longer answers get overlays only for their first words."""

# Yellow to red with increasing weight: visible on gray, and ordered by lightness for color-blind readers.
_STOPS = np.array([0.0, 0.5, 1.0])
_COLORS = np.array([[255, 237, 111], [253, 141, 60], [189, 0, 38]], float)

Grid = np.ndarray


def group_words(tokens: Sequence[dict[str, Any]], rows: int, columns: int) -> list[tuple[str, Grid]]:
    """Pieces of an answer -> (word, weights ``[rows, columns]``), the whole answer first.

    The weights of a word are the mean over its pieces. A piece that starts with a space starts a word.
    """
    words: list[tuple[str, list[Grid]]] = []
    begins_new = True
    for token in tokens:
        text = str(token["text"])
        grid = np.asarray(token["weights"], float).reshape(rows, columns)
        if not text.strip():
            begins_new = True
            continue
        if begins_new or text[0].isspace():
            words.append((text.strip(), [grid]))
        else:
            words[-1] = (words[-1][0] + text.rstrip(), [*words[-1][1], grid])
        begins_new = text[-1].isspace()
    if not words:
        return []
    whole = np.mean([grid for _, grids in words for grid in grids], axis=0)
    return [("", whole), *((word, np.mean(grids, axis=0)) for word, grids in words[:MAX_WORDS])]


def place_on_image(grid: Grid, width: int, height: int, mode: str) -> np.ndarray:
    """Weights on the model's square input -> weights on the image, ``[h, w]`` from 0 to 1, ``max(h, w) <= MAX_EDGE``.

    Args:
        mode: ``pad``: the square is the whole image with borders. ``square``: it is the center of the image, and the
            model did not see the rest.
    """
    scale = MAX_EDGE / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    edge = max(width, height) if mode == "pad" else min(width, height)
    top = grid.max()
    unit = (grid / top if top > 0 else grid).astype(np.float32)
    square = np.asarray(Image.fromarray(unit).resize((edge, edge), Image.Resampling.BICUBIC)).clip(0, 1)
    left, upper = (edge - width) // 2, (edge - height) // 2
    if mode == "pad":
        return square[upper : upper + height, left : left + width]
    placed = np.zeros((height, width), np.float32)
    placed[-upper : -upper + edge, -left : -left + edge] = square
    return placed


def to_data_url(weights: np.ndarray) -> str:
    """Weights ``[h, w]`` from 0 to 1 -> a PNG as a data URL, transparent where the weight is small."""
    colors = np.stack([np.interp(weights, _STOPS, _COLORS[:, channel]) for channel in range(3)], axis=-1)
    alpha = np.clip((weights - 0.15) / 0.85, 0, 1) ** 0.8 * 190
    rgba = np.concatenate([colors, alpha[..., None]], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
