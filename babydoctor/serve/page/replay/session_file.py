"""Read an exported session: the web UI's HTML file, or the JSON block from it."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.page.session import AnswerSettings
from babydoctor.serve.page.viewer.record import ViewRecord

FORMAT = "babydoctor-session-1"
_PNG_URL = "data:image/png;base64,"


@dataclass(frozen=True)
class RecordedView:
    """An image as the model received it. ``png`` is None if only the JSON is available."""

    caption: str
    pixels: str
    record: ViewRecord
    png: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class RecordedAnswer:
    """A question, all turns that were sent with it, and its answer."""

    question: str
    answer: str
    model: str
    sampling: AnswerSettings
    turns: tuple[Turn, ...]
    view: int


@dataclass(frozen=True)
class RecordedSession:
    views: tuple[RecordedView, ...]
    answers: tuple[RecordedAnswer, ...]


def read_session(path: Path) -> RecordedSession:
    """Read an exported session.

    Raises:
        UserError: the file does not exist, or is not a session in this format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a session that the web UI has exported") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; give a session that the web UI has exported") from None
    images: dict[int, bytes] = {}
    if text.lstrip().startswith("<"):
        parser = _SessionParser()
        parser.feed(text)
        text, images = "".join(parser.block), parser.images
    try:
        data = json.loads(text)
    except ValueError:
        raise UserError(f"{path} holds no session; give a file that the web UI has exported") from None
    stated = data.get("format") if isinstance(data, dict) else None
    if stated != FORMAT:
        raise UserError(f"{path}: the format is {stated!r}, not {FORMAT!r}; export the session with this version")
    try:
        return RecordedSession(
            tuple(_view(view, images.get(index)) for index, view in enumerate(data["views"])),
            tuple(_answer(answer, len(data["views"])) for answer in data["exchanges"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: an entry is missing or wrong ({type(error).__name__}: {error}). Sessions that older versions "
            "exported do not say how their images were made"
        ) from None


def _view(values: Mapping[str, Any], png: bytes | None) -> RecordedView:
    return RecordedView(
        str(values["caption"]), str(values["pixels_sha256"]), ViewRecord.from_json(values["state"]), png
    )


def _answer(values: Mapping[str, Any], num_views: int) -> RecordedAnswer:
    sampling, view = values["sampling"], int(values["view"])
    if not 0 <= view < num_views:
        raise ValueError(f"view {view}")
    # A question that was never sent to a model has no turns.
    turns = tuple(Turn(turn["role"], str(turn["text"])) for turn in values["turns"])
    return RecordedAnswer(
        question=str(values["question"]),
        answer=str(values["answer"]),
        model=str(values["model"]),
        sampling=AnswerSettings(
            float(sampling["temperature"]), float(sampling["top_p"]), int(sampling["max_new_tokens"])
        ),
        turns=turns or (Turn("user", f"{IMAGE_TOKEN}\n{values['question']}"),),
        view=view,
    )


class _SessionParser(HTMLParser):
    """Finds the JSON block and the images, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.block: list[str] = []
        self.images: dict[int, bytes] = {}
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._is_inside = tag == "script" and values.get("id") == "session"
        number, source = values.get("data-view", ""), values.get("src", "")
        if tag == "img" and number.isdecimal() and source.startswith(_PNG_URL):
            try:
                self.images[int(number)] = base64.b64decode(source.removeprefix(_PNG_URL), validate=True)
            except (binascii.Error, ValueError):
                return  # counts as missing pixels, which is reported

    def handle_endtag(self, tag: str) -> None:
        self._is_inside = False

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self.block.append(data)
