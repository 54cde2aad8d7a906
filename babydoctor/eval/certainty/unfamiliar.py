"""Images that no radiology model was trained on: upside-down scans, noise, pages of text, and photographs of a folder.

They measure whether a run notices unfamiliar images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from babydoctor.imaging.isolation import load_image
from babydoctor.schema import UserError

CROPS_PER_PHOTOGRAPH = 12

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_WORDS = (
    *("the", "patient", "was", "seen", "in", "clinic", "today", "and", "reports", "no", "pain", "over", "weeks"),
    *("medication", "continued", "blood", "pressure", "normal", "follow", "up", "report", "date", "signed"),
    *("physician", "history", "examination", "results", "were", "discussed", "last"),
)


def noise_picture(random: np.random.Generator) -> Image.Image:
    """Noise of one of four kinds: colored, gray, Gaussian, or gray blocks of 8 x 8 pixels."""
    edge, kind = int(random.choice([64, 128, 256])), int(random.integers(4))
    if kind == 0:
        levels = random.integers(0, 256, (edge, edge, 3)).astype(float)
    elif kind == 1:
        levels = random.integers(0, 256, (edge, edge, 1)).astype(float)
    elif kind == 2:
        levels = random.normal(random.uniform(60, 190), random.uniform(20, 60), (edge, edge, 1))
    else:
        levels = np.kron(random.integers(0, 256, (edge // 8, edge // 8, 1)), np.ones((8, 8, 1)))
    levels = np.broadcast_to(levels, (edge, edge, 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def text_picture(random: np.random.Generator) -> Image.Image:
    """A page of text, dark on light or light on dark."""
    width, height = ((600, 800), (800, 600), (500, 500))[random.integers(3)]
    paper, ink = ((15, 15, 20), (235, 235, 235)) if random.random() < 0.3 else ((250, 250, 248), (20, 20, 20))
    page = Image.new("RGB", (width, height), paper)
    pen, size = ImageDraw.Draw(page), int(random.integers(12, 28))
    font = ImageFont.load_default(size)
    top = int(random.integers(10, 60))
    while top < height - size:
        if random.random() > 0.1:  # else a blank line
            line = " ".join(random.choice(_WORDS, 20))
            pen.text((25, top), line[: int((width - 60) / (size * 0.5))], font=font, fill=ink)
        top += int(size * 1.4)
    return page


def photograph_pictures(folder: Path, random: np.random.Generator) -> Iterator[Image.Image]:
    """Random crops of the pictures in a folder, half of them mirrored.

    Raises:
        UserError: the folder holds no pictures.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not files:
        raise UserError(f"{folder} holds no pictures; --unfamiliar takes a folder with {', '.join(_PICTURES)} files")
    for file in files:
        picture = load_image(file)
        for _ in range(CROPS_PER_PHOTOGRAPH):
            share = random.uniform(0.5, 1)
            width, height = max(1, int(picture.width * share)), max(1, int(picture.height * share))
            left = int(random.integers(picture.width - width + 1))
            top = int(random.integers(picture.height - height + 1))
            crop = picture.crop((left, top, left + width, top + height))
            yield ImageOps.mirror(crop) if random.random() < 0.5 else crop


def upside_down_pictures(pictures: Sequence[Image.Image], random: np.random.Generator) -> Iterator[Image.Image]:
    """Each picture flipped top to bottom, or turned by 180 degrees."""
    for picture in pictures:
        yield ImageOps.flip(picture) if random.random() < 0.5 else picture.rotate(180)


def draw_many(draw: Callable[[np.random.Generator], Image.Image], count: int, seed: int) -> Iterator[Image.Image]:
    """``count`` pictures, the same ones for the same seed."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield draw(random)
