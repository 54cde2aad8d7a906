"""Measure how well burned-in text is found: on pydicom's images and phantoms with overlays, and on clean images."""

from __future__ import annotations

import itertools
import random
import resource
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from babydoctor.cores import num_cores
from babydoctor.imaging.burned_in import TextBox, TextReader
from babydoctor.imaging.isolation import load_image
from babydoctor.markers import markdown_table
from babydoctor.progress import show_progress
from babydoctor.schema import UserError

BASES = ("J2K_pixelrep_mismatch", "examples_overlay", "JPGExtended", "693_J2KI", "CT_small", "MR_small")
"""Images of pydicom without text of their own: CT, MR, a bone scan. Small ones are enlarged to 512 pixels."""

WITH_TEXT = ("GDCMJ2K_TextGBR", "examples_rgb_color", "examples_palette", "examples_jpeg2k", "examples_ybr_color")
"""Images of pydicom that contain text, so they are not clean."""

SIZES = (10, 12, 16, 24, 36)
CONTRASTS = (60, 120, 200)
EDGE = 512
HIDDEN_SHARE = 0.9
"""A text counts as hidden if this share of its letters' area is in boxes that are hidden by default."""

IDENTIFYING_TEXTS = {
    "name": (
        "DOE^JANE",
        "Smith, John A",
        "GARCIA MARIA",
        "Miller^Anna^K",
        "Yilmaz, Ayse",
        "ST MARY HOSPITAL",
        "Dr. Nguyen",
    ),
    "date": ("12/03/1957", "1957-03-12", "03 Mar 1957", "DOB: 25.11.2011", "14:32:07", "2023.11.07"),
    "number": ("ID 00482913", "MRN:7713052", "ACC 2311-0715", "PID 93-4471-2", "48291377"),
}
ALL_TEXTS = "all identifying texts hidden"
MARKS_HIDDEN = "laterality letters and scale marks hidden by mistake"
MARKS = ("R", "L", "5 cm", "AP")


@dataclass(frozen=True)
class Overlay:
    """A picture with texts. ``letters`` holds for each text its kind and the mask of its letters, ``bool [H, W]``."""

    image: Image.Image
    font: str
    size: int
    contrast: int
    letters: tuple[tuple[str, np.ndarray], ...]


def measure(num_processes: int | None = None) -> list[str]:
    """The table as Markdown lines.

    Raises:
        UserError: pydicom's files or the extra ``ocr`` are not installed.
    """
    num_processes = num_processes or num_cores()
    clean, overlays = clean_images(), list(build_overlays())
    reader = TextReader(num_processes, num_threads=1)
    reader.check()
    try:
        reader.find(clean[0])  # the models are loaded now
        images = [overlay.image for overlay in overlays]
        with ThreadPoolExecutor(num_processes) as pool:
            found = list(show_progress(pool.map(reader.find, images), "overlays", len(images)))
            on_clean = list(show_progress(pool.map(reader.find, clean), "clean images", len(clean)))
    finally:
        reader.close()
    alarms = sum(any(box.is_identifying for box in boxes) for boxes in on_clean)
    rows = _recall_rows(overlays, found)
    rows.append(("false alarms on pydicom's clean images", str(len(clean)), f"{alarms} ({alarms / len(clean):.1%})"))
    timed = images[:12]
    rows.append((f"CPU time per image of {EDGE} px", str(len(timed)), f"{_cpu_seconds_per_image(timed):.2f} s"))
    return markdown_table(("what", "number", "result"), rows)


def clean_images() -> list[Image.Image]:
    """All files of pydicom that can be decoded and contain no text."""
    from pydicom.data import get_testdata_file

    folder = Path(str(get_testdata_file("CT_small.dcm", download=False))).parent
    images = []
    for file in sorted(folder.glob("*.dcm")):
        if file.stem not in WITH_TEXT:
            try:
                images.append(load_image(file))
            except UserError:
                continue  # no image, or deliberately damaged
    if not images:
        raise UserError("pydicom's test files are not installed")
    return images


def build_overlays(sizes: Sequence[int] = SIZES, contrasts: Sequence[int] = CONTRASTS) -> Iterator[Overlay]:
    """Each background in each size and contrast, with a name, a date, a number and a mark; fonts take turns."""
    generator = random.Random(0)
    fonts = itertools.cycle(_fonts())
    for base, size, contrast in itertools.product(_backgrounds(), sizes, contrasts):
        yield _overlay(base, next(fonts), size, contrast, generator)


def _backgrounds() -> list[Image.Image]:
    from pydicom.data import get_testdata_file

    from babydoctor.phantom.case import build_cases
    from babydoctor.phantom.drawing import draw

    real = [load_image(str(get_testdata_file(f"{name}.dcm", download=False))) for name in BASES]
    drawn = [Image.fromarray(draw(case, EDGE)).convert("RGB") for case in build_cases("held_out", 6, 1)]
    return [image if max(image.size) > 256 else image.resize((EDGE, EDGE)) for image in [*real, *drawn]]


def _fonts() -> list[tuple[str, Path | None]]:
    """Fonts that come with matplotlib, and Pillow's own (None)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif", "STIXGeneral", "DejaVuSansMono", "DejaVuSans-Bold")
    return [*((name, folder / f"{name}.ttf") for name in names), ("Aileron", None)]


def _overlay(
    base: Image.Image, font: tuple[str, Path | None], size: int, contrast: int, generator: random.Random
) -> Overlay:
    face = ImageFont.truetype(str(font[1]), size) if font[1] else ImageFont.load_default(size)
    pixels = np.array(base).astype(np.int16)
    texts = [(kind, generator.choice(choices)) for kind, choices in IDENTIFYING_TEXTS.items()]
    taken = np.zeros(pixels.shape[:2], bool)
    letters = []
    for kind, text in [*texts, ("mark", generator.choice(MARKS))]:
        left, top, right, bottom = map(int, face.getbbox(text))
        glyphs = Image.new("L", (right - left + 2, bottom - top + 2))
        ImageDraw.Draw(glyphs).text((1 - left, 1 - top), text, font=face, fill=255)
        ink = np.asarray(glyphs).astype(np.float32) / 255  # [h, w]
        place = _place(pixels, taken, ink.shape, contrast, generator)
        if place is None:
            continue
        y, x = place
        area = pixels[y : y + ink.shape[0], x : x + ink.shape[1]]
        mean = area.mean()
        value = mean + contrast if mean + contrast <= 255 else max(0, mean - contrast)
        area[:] = area * (1 - ink[..., None]) + value * ink[..., None]
        mask = np.zeros(taken.shape, bool)
        mask[y : y + ink.shape[0], x : x + ink.shape[1]] = ink > 0.5
        taken[max(0, y - size) : y + ink.shape[0] + size, max(0, x - size) : x + ink.shape[1] + size] = True
        letters.append((kind, mask))
    return Overlay(Image.fromarray(pixels.astype(np.uint8)), font[0], size, contrast, tuple(letters))


def _place(
    pixels: np.ndarray, taken: np.ndarray, shape: tuple[int, ...], contrast: int, generator: random.Random
) -> tuple[int, int] | None:
    """(y, x) of a free area on which text of this contrast is readable; None if there is none."""
    height, width = taken.shape
    for _ in range(200):
        y, x = generator.randint(2, height - shape[0] - 2), generator.randint(2, max(3, width - shape[1] - 2))
        area = pixels[y : y + shape[0], x : x + shape[1]]
        if x + shape[1] <= width and not taken[y : y + shape[0], x : x + shape[1]].any() and area.std() < contrast / 4:
            return y, x
    return None


def _recall_rows(overlays: Sequence[Overlay], found: Sequence[Sequence[TextBox]]) -> list[tuple[str, str, str]]:
    counts: defaultdict[str, list[bool]] = defaultdict(list)
    for overlay, boxes in zip(overlays, found, strict=True):
        hidden = np.zeros((overlay.image.height, overlay.image.width), bool)
        for box in boxes:
            if box.is_identifying:
                hidden[box.top : box.bottom, box.left : box.right] = True
        for kind, mask in overlay.letters:
            is_hidden = bool(hidden[mask].mean() >= HIDDEN_SHARE)
            if kind == "mark":
                counts[MARKS_HIDDEN].append(is_hidden)
                continue
            groups = (ALL_TEXTS, f"{kind}s", f"{overlay.size} px letters")
            for group in (*groups, f"contrast {overlay.contrast} of 255", f"font {overlay.font}"):
                counts[group].append(is_hidden)
    order = (ALL_TEXTS, "names", "dates", "numbers", *(f"{size} px letters" for size in SIZES))
    order = (*order, *(f"contrast {contrast} of 255" for contrast in CONTRASTS))
    order = (*order, *sorted(group for group in counts if group.startswith("font ")), MARKS_HIDDEN)
    return [(group, str(len(counts[group])), f"{np.mean(counts[group]):.1%}") for group in order if group in counts]


def _cpu_seconds_per_image(images: Sequence[Image.Image]) -> float:
    """CPU seconds of a search, without the start of its process. Wall time would also measure other load."""

    def cost(searched: Sequence[Image.Image]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        reader = TextReader(num_threads=1)
        try:
            for image in searched:
                reader.find(image)
        finally:
            reader.close()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return (cost([images[0], *images]) - cost(images[:1])) / len(images)
