"""The user's image: a picture or a DICOM file in memory, and the current view of it.

A ``View`` contains the PNG that the browser shows, so the model receives what the user sees. Nothing is written to
disk. From a DICOM file's header, only ``dicom.harmless_facts`` leave this module.
"""

from __future__ import annotations

import math
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from babydoctor.imaging.burned_in import hide
from babydoctor.imaging.dicom import DicomImage, harmless_facts, identifying_tags, is_dicom, read_dicom
from babydoctor.imaging.dicom.values import text
from babydoctor.imaging.isolation import load_image, render
from babydoctor.imaging.series import hash_of
from babydoctor.imaging.windows import CT_PRESETS
from babydoctor.schema import UserError
from babydoctor.serve.page.privacy.pixel_text import PixelText
from babydoctor.serve.page.study.stack import FILE_NAME, Stack
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.arrangement import Arrangement
from babydoctor.serve.page.viewer.image_errors import dicom_error, picture_error
from babydoctor.serve.page.viewer.record import ViewRecord
from babydoctor.serve.page.viewer.view import View, to_view

FILE_WINDOW = "as stored in the file"
"""Choice of the file's own window."""

AUTO_WINDOW = "automatic"
"""The same choice for a file without a window, whose window is computed from the frame's values."""

CT_DEFAULT = "soft-tissue"
"""Initial preset of a CT that stores no window: level 40, width 400."""

MAX_WINDOW = 1e6
"""Largest level and width that may be typed, in the units of the frame's values."""

_NARROWEST = 1e-12
"""Smallest width used for rendering, to avoid division by zero."""

_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_WINDOW = re.compile(r"cent(?:er|re) (\S+), width (\S+)")


@dataclass
class WindowRange:
    """Values and ranges of the window sliders, in the units of the frame's values (HU for CT)."""

    center: float
    width: float
    low: float
    high: float
    widest: float

    @property
    def step(self) -> float:
        """1 if the range is large, else a 200th of the range."""
        return 1.0 if self.high - self.low >= 50 else max((self.high - self.low) / 200, 1e-12)

    @property
    def narrowest(self) -> float:
        """The smallest width of the slider."""
        return min(1.0, self.step)


@dataclass
class Scan:
    """The loaded image, or a series of images.

    ``dicom`` is None for plain pictures. For a series, ``stack`` holds all images, and ``dicom`` or ``picture`` is the
    first one. ``frame`` is the index of a frame in a file or of an image in a series. ``file`` is the SHA-256 of a
    single file.
    """

    dicom: DicomImage | None
    picture: Image.Image | None
    facts: dict[str, Any]
    num_identifying: int = 0
    title: str = ""
    truth: str = ""
    frame: int = 0
    center: float | None = None
    width: float | None = None
    preset: str | None = None
    text: PixelText = field(default_factory=PixelText)
    arrangement: Arrangement = field(default_factory=Arrangement)
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16), repr=False)
    """Identifies the scan in the URLs of its frames."""
    change: int = 0
    """Number of the last change from the canvas."""
    stack: Stack | None = field(default=None, repr=False)
    label: str = ""
    file: str = ""
    own_windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Frame -> (center, width) of the frame's own window."""

    @property
    def num_bytes(self) -> int:
        """Memory of the file or its pixels."""
        picture = self.picture.width * self.picture.height * 3 if self.picture else 0
        return picture + (2 * len(self.dicom.data) if self.dicom else 0)  # the file, and the values parsed from it

    @property
    def num_frames(self) -> int:
        if self.stack is not None:
            return len(self.stack)
        return self.dicom.num_frames if self.dicom else 1

    @property
    def noun(self) -> str:
        """The word for what ``frame`` counts."""
        return self.stack.noun if self.stack is not None else "frame"

    def source(self) -> tuple[DicomImage, int]:
        """The DICOM file that is shown, and the frame in it.

        Raises:
            UserError: an image of a series cannot be parsed.
        """
        if self.stack is not None:
            return self.stack.dicom(self.frame)
        assert self.dicom is not None
        return self.dicom, self.frame

    def record(self) -> ViewRecord:
        """How the scan is shown."""
        file, instance, series, frame = self.file, "", "", self.frame
        if self.stack is not None:
            shown, frame = self.stack.file(self.frame)
            file, instance, series = shown.sha256, shown.facts.instance, shown.facts.series
        elif self.dicom is not None:
            uids = (text(self.dicom.dataset, keyword) for keyword in ("SOPInstanceUID", "SeriesInstanceUID"))
            instance, series = map(hash_of, uids)
        hidden = tuple(self.text.hidden(self.frame))
        return ViewRecord(file, instance, series, frame, self.preset, self.center, self.width, self.arrangement, hidden)

    @property
    def has_window(self) -> bool:
        return self.dicom is not None and self.dicom.photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def stores_window(self) -> bool:
        """True if the file has a window or a VOI LUT."""
        return self.dicom is not None and bool(self.dicom.windows or self.dicom.dataset.get("VOILUTSequence"))

    @property
    def own_window(self) -> str:
        """Label of the choice without a preset."""
        return FILE_WINDOW if self.stores_window else AUTO_WINDOW

    @property
    def default_preset(self) -> str | None:
        """The initial preset; None for the file's own window."""
        is_bare_ct = self.facts.get("modality") == "CT" and self.has_window and not self.stores_window
        return CT_DEFAULT if is_bare_ct else None

    @property
    def presets(self) -> list[str]:
        return [self.own_window, *(CT_PRESETS if self.facts.get("modality") == "CT" else ())]

    def set_window(self, center: float, width: float) -> None:
        """Set a level and a width that the user chose, inside or outside the sliders' ranges.

        Raises:
            PageError: a value is not finite or exceeds ``MAX_WINDOW``, or the width is negative.
        """
        if not (abs(center) <= MAX_WINDOW and 0 <= width <= MAX_WINDOW):
            raise PageError("bad_window")
        self.preset = None
        self.center, self.width = float(center), max(float(width), _NARROWEST)

    def view(self) -> View:
        """Render the chosen frame with the chosen window, without the hidden texts.

        Raises:
            PageError: the frame cannot be decoded.
        """
        record = self.record()
        image, caption = self.rendered()
        hidden = record.hidden
        note = f"{len(hidden)} text{'s' if len(hidden) > 1 else ''} hidden" if hidden else ""
        shown = self.arrangement.apply(hide(image, hidden), self.facts["columns"], self.facts["rows"])
        caption = " · ".join(part for part in (caption, self.arrangement.caption, note) if part)
        return replace(to_view(shown, caption), source_size=image.size, hidden=hidden, record=record)

    def rendered(self) -> tuple[Image.Image, str]:
        """The chosen frame with the chosen window and all its text, and one line that says how it was made.

        Raises:
            PageError: the frame cannot be decoded.
        """
        number = f"{self.noun} {self.frame + 1} of {self.num_frames}" if self.num_frames > 1 else ""
        try:
            if self.dicom is None:
                assert self.picture is not None
                return (self.stack.picture(self.frame) if self.stack is not None else self.picture), number
            image = render(*self.source(), self.center, self.width, self.preset)
        except UserError as error:
            raise (dicom_error(error) if self.dicom else picture_error(error, True)) from None
        # Radiologists say level; the standard says center.
        window = _WINDOW.sub(r"level \1, width \2", str(image.info.get("window", "")))
        window += "".join(f" · Note: {warning}" for warning in image.info.get("warnings", ()))
        return image, ", ".join(part for part in (number, window) if part)

    def window_range(self) -> WindowRange:
        """The current window and the ranges of the sliders: fixed for CT (HU), else around the file's own window."""
        assert self.dicom is not None and self.has_window
        if self.preset is not None:
            center, width = CT_PRESETS[self.preset].center, CT_PRESETS[self.preset].width
        elif self.center is not None and self.width is not None:
            center, width = self.center, self.width
        else:
            center, width = self._own_window()
        if self.facts.get("modality") == "CT":
            return WindowRange(center, width, min(-1024.0, center), max(3071.0, center), max(4096.0, width))
        own_center, own_width = self._own_window()
        reach, widest = 2 * own_width, 4 * own_width
        low, high = own_center - reach, own_center + reach
        if high - low >= 50:
            low, high, widest = math.floor(low), math.ceil(high), math.ceil(widest)
        return WindowRange(center, width, min(low, center), max(high, center), max(widest, width))

    def _own_window(self) -> tuple[float, float]:
        if self.frame not in self.own_windows:
            self.own_windows[self.frame] = self._read_own_window()
        return self.own_windows[self.frame]

    def _read_own_window(self) -> tuple[float, float]:
        assert self.dicom is not None
        found = _WINDOW.search(str(render(*self.source()).info.get("window", "")))
        if found:  # a VOI LUT has no center or width
            return float(found[1]), float(found[2])
        bits = int(self.dicom.dataset.get("BitsStored") or 12)
        return 2.0 ** (bits - 1), 2.0**bits


def open_scan(data: bytes) -> Scan:
    """Read an uploaded file. Its content decides its kind; its name is never known here.

    Raises:
        PageError: the file is empty, not an image, damaged or too large.
    """
    if not data:
        raise PageError("empty_file")
    looks_like_image = data.startswith(_IMAGE_MAGIC)
    if is_dicom(data):
        return _open_dicom(data)
    try:
        picture = load_image(data)
    except UserError as error:
        raise picture_error(error, looks_like_image) from None
    return Scan(None, picture, {"rows": picture.height, "columns": picture.width}, file=hash_of(data))


def _open_dicom(data: bytes) -> Scan:
    try:
        # Parse in a decoding process first, which refuses a header that takes too much time or memory.
        load_image(data, name=FILE_NAME)
        dicom = read_dicom(data, name=FILE_NAME)
        scan = Scan(dicom, None, harmless_facts(dicom), len(identifying_tags(dicom)), file=hash_of(data))
        scan.preset = scan.default_preset
        return scan
    except UserError as error:
        raise dicom_error(error) from None


def describe(scan: Scan) -> list[tuple[str, str]]:
    """Names and values of the facts about a scan that identify nobody, in display order."""
    facts = scan.facts
    if scan.dicom is None:
        return [("Kind", "picture"), ("Size", f"{facts['columns']} × {facts['rows']} pixels")]
    rows = [("Modality", facts.get("modality") or "not stated")]
    if facts.get("body_part"):
        rows.append(("Body part", facts["body_part"]))
    if facts.get("view"):
        rows.append(("View", facts["view"]))
    if facts.get("laterality"):
        rows.append(("Side", facts["laterality"]))
    rows.append(("Size", f"{facts['columns']} × {facts['rows']} pixels"))
    if spacing := facts.get("pixel_spacing_mm"):
        rows.append(("Pixel spacing", f"{spacing[0]:.3g} × {spacing[1]:.3g} mm"))
    else:
        rows.append(("Pixel spacing", "not stated"))
    if scan.num_frames > 1:
        rows.append((f"{scan.noun.capitalize()}s", str(scan.num_frames)))
    if facts.get("photometric") == "MONOCHROME1":
        rows.append(("Gray scale", "MONOCHROME1: low values are bright; shown that way"))
    return rows
