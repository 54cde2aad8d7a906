"""Boxes around text, and how to hide them in a picture. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from babydoctor.imaging.burned_in.kinds import IDENTIFYING, TextKind


@dataclass(frozen=True)
class TextBox:
    """A text in a picture. Edges are pixels of that picture, ``right`` and ``bottom`` exclusive.

    Args:
        kind: class of the text.
        score: confidence of the recognition, 0 to 1.
        text: the recognized text. Left out of ``repr``, logs and reports, because it may name a person.
    """

    left: int
    top: int
    right: int
    bottom: int
    kind: TextKind
    score: float = 1.0
    text: str = field(default="", repr=False, compare=False)

    @property
    def is_identifying(self) -> bool:
        return self.kind in IDENTIFYING

    @property
    def height(self) -> int:
        return self.bottom - self.top


def widen(boxes: Iterable[TextBox], width: int, height: int) -> list[TextBox]:
    """Give identifying boxes a margin, and join those of one line.

    Detection sometimes misses the first or last letters of a line, or a word between two others, where the background
    is as bright as the letters. A margin of half a line's height on both sides covers the letters. Joining boxes less
    than one and a half heights apart covers the word.

    Args:
        width, height: size of the picture, at which boxes are cut off.
    """
    boxes = list(boxes)
    joined: list[TextBox] = []
    for box in sorted((box for box in boxes if box.is_identifying), key=lambda box: (box.left, box.top)):
        index = next((i for i, other in enumerate(joined) if _on_one_line(other, box)), None)
        if index is None:
            joined.append(box)
        else:
            joined[index] = _union(joined[index], box)
    joined.sort(key=lambda box: (box.top, box.left))
    return [*(_with_margin(box, width, height) for box in joined), *(box for box in boxes if not box.is_identifying)]


def hide(image: Image.Image, boxes: Iterable[TextBox]) -> Image.Image:
    """Return a copy of an RGB picture with the boxes filled by the median color of their surroundings.

    A black box on a bright picture could look like a finding. ``image.info`` is kept.
    """
    boxes = list(boxes)
    if not boxes:
        return image
    pixels = np.array(image)
    source = np.asarray(image)
    for box in boxes:
        ring = max(2, box.height // 4)
        top, left = max(0, box.top - ring), max(0, box.left - ring)
        around = source[top : box.bottom + ring, left : box.right + ring]
        is_around = np.ones(around.shape[:2], bool)
        is_around[box.top - top : box.bottom - top, box.left - left : box.right - left] = False
        outside = around[is_around]
        pixels[box.top : box.bottom, box.left : box.right] = np.median(outside, axis=0) if outside.size else 0
    hidden = Image.fromarray(pixels)
    hidden.info = dict(image.info)
    return hidden


def _on_one_line(left: TextBox, right: TextBox) -> bool:
    shared = min(left.bottom, right.bottom) - max(left.top, right.top)
    height = min(left.height, right.height)
    is_of_one_size = max(left.height, right.height) < 2 * height
    return shared > 0.6 * height and is_of_one_size and right.left - left.right < 1.5 * height


def _union(a: TextBox, b: TextBox) -> TextBox:
    return replace(
        a,
        left=min(a.left, b.left),
        top=min(a.top, b.top),
        right=max(a.right, b.right),
        bottom=max(a.bottom, b.bottom),
        score=min(a.score, b.score),
        text=f"{a.text} {b.text}",
    )


def _with_margin(box: TextBox, width: int, height: int) -> TextBox:
    aside, above = max(2, box.height // 2), max(1, box.height // 8)
    return replace(
        box,
        left=max(0, box.left - aside),
        top=max(0, box.top - above),
        right=min(width, box.right + aside),
        bottom=min(height, box.bottom + above),
    )
