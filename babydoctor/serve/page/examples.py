"""Example cases: held-out phantoms, drawn at startup, and real images from pydicom. Nothing is downloaded."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from babydoctor.phantom.case import DEMO_SEED, Case, build_cases
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.texts import PageError

PHANTOM_SIZE = 224
THUMBNAIL_SIZE = 112

_PHANTOMS = (("radiograph", "effusion"), ("ct", "nodule"), ("mr", "cyst"), ("ultrasound", "none"))
_MODALITY_NAMES = {"radiograph": "radiograph", "ct": "CT", "mr": "MR", "ultrasound": "ultrasound"}

# Name in pydicom.examples -> title. RT, waveform and DICOMDIR files contain no image.
_REAL = (
    ("ct", "Real CT, spine"),
    ("overlay", "Real MR, abdomen"),
    ("jpeg2k", "Real ultrasound, Doppler"),
    ("ybr_color", "Real echo, 30 frames"),
)


@dataclass(frozen=True)
class ExampleCase:
    """An example case. ``load`` returns the bytes of the file. ``truth`` and ``case`` are set for phantoms only."""

    key: str
    title: str
    load: Callable[[], bytes]
    thumbnail: str
    question: str
    truth: str = ""
    case: Case | None = None


def build_examples(num_phantoms_of_each: int = 1) -> list[ExampleCase]:
    """Draw the phantoms and find pydicom's files. Files that are not installed are left out."""
    return [*_phantoms(num_phantoms_of_each), *_real_ones()]


def _phantoms(num_of_each: int) -> list[ExampleCase]:
    from babydoctor.phantom.drawing import draw

    # Cases of the demo's held-out split, which no model was trained on.
    cases = build_cases("held_out", 240, DEMO_SEED)
    examples = []
    for modality, finding in _PHANTOMS:
        fitting = [case for case in cases if (case.modality, case.finding) == (modality, finding)]
        for case in fitting[:num_of_each]:
            buffer = io.BytesIO()
            Image.fromarray(draw(case, PHANTOM_SIZE)).save(buffer, "PNG")
            data = buffer.getvalue()
            level = "mid" if case.level == "middle" else case.level
            place = f" in the {case.side} {level} zone" if case.side else ""
            truth = f"{finding}{place}" if case.side else "no finding"
            title = f"Phantom {_MODALITY_NAMES[modality]}, {'normal' if finding == 'none' else finding}"
            question = "What does the image show?"
            examples.append(ExampleCase(case.id, title, partial(bytes, data), _thumbnail(data), question, truth, case))
    return examples


def _real_ones() -> list[ExampleCase]:
    from pydicom.examples import get_path

    examples = []
    for name, title in _REAL:
        try:
            path = Path(get_path(name))
            thumbnail = _thumbnail(path.read_bytes())
        except (OSError, ValueError, TypeError, PageError):
            continue
        examples.append(
            ExampleCase(f"pydicom-{name}", title, path.read_bytes, thumbnail, "Which imaging modality is this?")
        )
    return examples


def _thumbnail(data: bytes) -> str:
    view = open_scan(data).view()
    image = Image.open(io.BytesIO(view.png)).convert("RGB")
    # Crop the center square, so that all thumbnails have the same shape.
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    image = image.crop((left, top, left + edge, top + edge)).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
