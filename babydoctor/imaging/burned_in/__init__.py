"""Find, classify and hide text that is burned into the pixels of an image.

``find_text`` reads a decoded picture with RapidOCR (PP-OCRv6 on onnxruntime; the wheel contains the models, so nothing
is downloaded), in a separate process with a limit of CPU time. Names, dates and numbers are classified as identifying;
laterality letters, scale marks and known technical words as marks. The text is only used to classify it: it stays in
``TextBox`` and is neither logged nor written.
"""

from __future__ import annotations

from babydoctor.imaging.burned_in.boxes import TextBox, hide
from babydoctor.imaging.burned_in.kinds import IDENTIFYING, TextKind
from babydoctor.imaging.burned_in.reader import TextReader, TextSearchError, find_text, is_available

__all__ = ["IDENTIFYING", "TextBox", "TextKind", "TextReader", "TextSearchError", "find_text", "hide", "is_available"]
