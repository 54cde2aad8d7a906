"""Burned-in text: classify it, find it in real pictures, hide it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.examples import get_path

from babydoctor.imaging.burned_in import TextBox, TextReader, TextSearchError, hide, is_available
from babydoctor.imaging.burned_in.boxes import widen
from babydoctor.imaging.burned_in.kinds import kind_of
from babydoctor.imaging.load import load_image

needs_ocr = pytest.mark.skipif(not is_available(), reason="the extra ocr is not installed")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "name") for text in ("DOE^JANE", "Smith, John A", "LI", "ST MARY HOSPITAL", "Dr. Ng", "山田 太郎")),
        *((text, "date") for text in ("12/03/1957", "1957-03-12", "03 Mar 1957", "14:32:07", "19570312", "25.11.2011")),
        *((text, "date") for text in ("067Y", "F 067Y", "67 yrs", "DOB: 25.11.2011", "March 3, 1957", "9:05")),
        *((text, "number") for text in ("ID 00482913", "MRN:7713052", "630P630", "78F78", "ACC 4711", "483920")),
        *((text, "mark") for text in ("R", "L", "LT", "AP", "5 cm", "10mm", "MI 0.9", "TIS<0.4", "W 400 L 40", "19")),
        *(
            (text, "mark")
            for text in ("0.9", "28Hz", "Frame 12", "2D", "PORTABLE", "C5-1", "3/3/4", "120 kV", "+", "Im: 7")
        ),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert kind_of(text, 0.95) == kind


def test_uncertain_text_is_noise_or_unclear() -> None:
    assert kind_of("%;", 0.2) is None
    assert kind_of("J0hm5mth", 0.3) == "unclear"


def test_boxes_on_one_line_are_joined_and_marks_are_not() -> None:
    boxes = [
        TextBox(10, 10, 40, 20, "name"),
        TextBox(52, 11, 90, 21, "name"),
        TextBox(10, 60, 40, 70, "date"),
        TextBox(95, 10, 100, 20, "mark"),
    ]
    line, other, mark = widen(boxes, 94, 100)
    assert (line.left, line.top, line.right, line.bottom) == (5, 9, 94, 22)
    assert (other.left, other.right, other.kind) == (5, 45, "date")
    assert mark == boxes[3]


def test_hidden_boxes_get_the_color_of_their_surroundings() -> None:
    pixels = np.full((40, 60, 3), 90, np.uint8)
    pixels[10:20, 10:30] = 255
    image = Image.fromarray(pixels)
    image.info["window"] = "w"
    hidden = hide(image, [TextBox(10, 10, 30, 20, "name")])
    assert (np.asarray(hidden) == 90).all()
    assert hidden.info == {"window": "w"}
    assert np.asarray(image)[15, 15, 0] == 255, "the picture itself is not changed"
    assert "Doe" not in repr(TextBox(0, 0, 1, 1, "name", text="Doe"))


def _with_text(size: int = 16) -> tuple[Image.Image, dict[str, tuple[int, int, int, int]]]:
    """pydicom's MR of the abdomen with a name, a date, a number and marks on it, and where they are."""
    image = load_image(get_path("overlay"))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    places = {"Doe, Jane": (6, 6), "12/03/1957": (6, 30), "MRN 7713052": (300, 6), "R": (12, 150), "5 cm": (420, 270)}
    boxes = {}
    for text, at in places.items():
        draw.text(at, text, font=font, fill="white")
        boxes[text] = tuple(map(int, draw.textbbox(at, text, font=font)))
    return image, boxes


@pytest.fixture(scope="module")
def reader() -> Iterator[TextReader]:
    reader = TextReader()
    yield reader
    reader.close()


@needs_ocr
def test_identifying_text_is_found_and_marks_stay(reader: TextReader) -> None:
    image, places = _with_text()
    found = reader.find(image)
    hidden = np.asarray(hide(image, [box for box in found if box.is_identifying])).astype(int)
    before = np.asarray(image).astype(int)
    for text, (left, top, right, bottom) in places.items():
        bright = before[top:bottom, left:right].min(2) > 200
        left_over = (hidden[top:bottom, left:right].min(2) > 200) & bright
        assert left_over.sum() == (bright.sum() if text in ("R", "5 cm") else 0), text
    outside = np.ones(before.shape[:2], bool)
    for box in found:
        outside[box.top : box.bottom, box.left : box.right] = False
    assert (hidden[outside] == before[outside]).all()


@needs_ocr
def test_a_clean_picture_has_no_identifying_text(reader: TextReader) -> None:
    assert not [box for box in reader.find(load_image(get_path("overlay"))) if box.is_identifying]


@needs_ocr
def test_a_search_over_its_limit_is_stopped_and_the_next_one_works(reader: TextReader) -> None:
    image, _ = _with_text()
    with pytest.raises(TextSearchError, match=r"longer than 0\.01 s"):
        reader.find(image, seconds=0.01)
    assert reader.find(image)


@needs_ocr
def test_a_process_that_dies_is_replaced(reader: TextReader) -> None:
    image, _ = _with_text()
    reader.find(image)
    os.kill(reader._idle[0]._child.pid, signal.SIGKILL)
    reader._idle[0]._child.wait()
    with pytest.raises(TextSearchError):
        reader.find(image)
    assert reader.find(image)


def test_without_the_extra_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TextSearchError, match=r"babydoctor\[ocr\]"):
        TextReader().find(Image.new("RGB", (8, 8)))
