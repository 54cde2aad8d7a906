"""Burned-in text of one loaded image: the texts found in its frames, and those hidden from the model. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from babydoctor.imaging.burned_in import TextBox

_SAME_SHARE = 0.5
"""Boxes of two searches belong to the same text if they share this much of their area."""


@dataclass
class PixelText:
    """Texts in the pixels of an image, by frame.

    A frame is searched again under another window, because a window can reveal text. Boxes of all searches are kept.
    Identifying text is hidden and other marks stay visible, unless the user decides otherwise. A decision also applies
    to the same position in other frames.
    """

    boxes: dict[int, list[TextBox]] = field(default_factory=dict)
    searched: set[Hashable] = field(default_factory=set)
    has_failed: bool = False
    """True if the last search failed, so the view may contain text."""
    shown: list[TextBox] = field(default_factory=list)
    hides_marks: bool = False

    def add(self, frame: int, found: Sequence[TextBox]) -> None:
        """Add the result of a search of a frame."""
        known = self.boxes.setdefault(frame, [])
        known += [box for box in found if not any(_is_same(box, other) for other in known)]

    def identifying(self, frame: int) -> list[TextBox]:
        """Texts of a frame that look like a name, a date or a number, in order of their numbers in the web UI."""
        return [box for box in self.boxes.get(frame, ()) if box.is_identifying]

    def marks(self, frame: int) -> list[TextBox]:
        """The texts of a frame that identify nobody."""
        return [box for box in self.boxes.get(frame, ()) if not box.is_identifying]

    def is_hidden(self, box: TextBox) -> bool:
        if not box.is_identifying:
            return self.hides_marks
        return not any(_is_same(box, other) for other in self.shown)

    def hidden(self, frame: int) -> list[TextBox]:
        """The texts of a frame that are hidden from the model."""
        return [box for box in self.boxes.get(frame, ()) if self.is_hidden(box)]

    def toggle(self, box: TextBox) -> None:
        """Show an identifying text that is hidden, or hide it again."""
        if self.is_hidden(box):
            self.shown.append(box)
        else:
            self.shown = [other for other in self.shown if not _is_same(box, other)]


def _is_same(a: TextBox, b: TextBox) -> bool:
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    areas = [(box.right - box.left) * box.height for box in (a, b)]
    return width > 0 and height > 0 and width * height > _SAME_SHARE * max(areas)
