"""An image as the web UI shows it and as the model receives it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

from PIL import Image

from babydoctor.imaging.burned_in import TextBox
from babydoctor.serve.page.viewer.record import ViewRecord

MAX_VIEW_EDGE = 1536
"""Longest edge of a view. Larger images are shrunk, because vision towers use only 224 to 448 pixels."""

THUMBNAIL_EDGE = 72


@dataclass(frozen=True)
class View:
    """An image as shown: PNG bytes, size in pixels, one line that says how it was made, a thumbnail as data URL.

    ``source_size`` is the (width, height) before shrinking. ``hidden`` are the boxes of texts that it does not show, in
    pixels of that size. ``record`` describes how to render it again.
    """

    png: bytes = field(repr=False)
    width: int
    height: int
    caption: str
    thumbnail: str = field(default="", repr=False)
    source_size: tuple[int, int] = (0, 0)
    hidden: tuple[TextBox, ...] = ()
    record: ViewRecord = field(default=ViewRecord(), repr=False)

    @property
    def data_url(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def to_view(image: Image.Image, caption: str) -> View:
    """The image, shrunk to ``MAX_VIEW_EDGE`` and encoded without the metadata of its file."""
    if max(image.size) > MAX_VIEW_EDGE:
        image = image.copy()
        image.thumbnail((MAX_VIEW_EDGE, MAX_VIEW_EDGE), Image.Resampling.LANCZOS)
    image.info = {}  # text fields of a PNG may name a patient
    small = image.copy()
    small.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    thumbnail = f"data:image/jpeg;base64,{base64.b64encode(_encoded(small, 'JPEG', quality=80)).decode()}"
    return View(_encoded(image, "PNG", compress_level=3), image.width, image.height, caption, thumbnail)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
