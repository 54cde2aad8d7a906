"""Text that is burned into the pixels of an image: where it is, what it looks like, and how to hide it.

``find_text`` reads a decoded picture by RapidOCR (PP-OCRv6 through onnxruntime; the wheel holds the models, so nothing
is downloaded), in a process of its own with a limit of CPU time. Names, dates and numbers come back as identifying;
laterality letters, scale marks and known technical words as marks. The text is only used to tell these apart: it never
leaves ``TextBox``, and it is not logged or written.
"""

from __future__ import annotations

from babydoctor.imaging.burned_in.boxes import TextBox, hide
from babydoctor.imaging.burned_in.kinds import IDENTIFYING, TextKind
from babydoctor.imaging.burned_in.reader import TextReader, TextSearchError, find_text, is_available

__all__ = ["IDENTIFYING", "TextBox", "TextKind", "TextReader", "TextSearchError", "find_text", "hide", "is_available"]
