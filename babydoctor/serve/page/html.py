"""Session -> HTML. The Jinja2 templates in ``templates/`` escape all values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from babydoctor.imaging.burned_in import is_available
from babydoctor.serve.page import texts
from babydoctor.serve.page.certainty.texts import lines_under_answer
from babydoctor.serve.page.conversation.answer_text import render_answer
from babydoctor.serve.page.conversation.running_map import RunningMap
from babydoctor.serve.page.examples import THUMBNAIL_SIZE, ExampleCase
from babydoctor.serve.page.pacs.client import PacsSeries, PacsStudy
from babydoctor.serve.page.scan import Scan, View, describe
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.study.reasons import UNREAD
from babydoctor.serve.page.study.study import Study
from babydoctor.serve.page.viewer.state import viewer_state

OVERLAY_HEIGHT_PX = 380


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("babydoctor.serve.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(name: str, **values: Any) -> str:
    return _environment().get_template(name).render(values).strip()


def banner() -> str:
    """The notice at the top, and the line about a lost connection, which ``connection.js`` fills in."""
    return _render("banner.html", notice=texts.RESEARCH_NOTICE, sentences=texts.CONNECTION)


def title() -> str:
    return _render("title.html")


def drop_zone(max_bytes: int, max_study_bytes: int) -> str:
    """The drop zone for files, with the progress of the upload."""
    return _render("drop.html", max_bytes=max_bytes, max_study_bytes=max_study_bytes)


def gallery(examples: Sequence[ExampleCase]) -> str:
    """The example cases as buttons with pictures."""
    return _render("gallery.html", examples=examples, edge=THUMBNAIL_SIZE)


def status(text: str, kind: str = "error") -> str:
    """A line that screen readers announce. Empty if there is no text.

    Args:
        kind: ``error``, ``warning`` or ``info``.
    """
    return _render("status.html", text=text, kind=kind) if text else ""


def viewer(view: View | None, scan: Scan | None = None, state: Mapping[str, Any] | None = None) -> str:
    """The image as the model receives it, with boxes around burned-in text. ``state`` is for the canvas."""
    shown = {"view": view, "state": json.dumps(state) if state else ""}
    # Boxes are in pixels of the file, so they are not drawn over a rotated or cropped image.
    if view is None or scan is None or scan.arrangement.caption:
        return _render("viewer.html", **shown, boxes=())
    boxes = [(box, scan.text.is_hidden(box)) for box in scan.text.identifying(scan.frame)]
    return _render("viewer.html", **shown, boxes=boxes, size=view.source_size)


def canvas(*, is_second: bool = False) -> str:
    """The canvas and buttons of a viewer. ``viewer.js`` or ``viewer_second.js`` fills it."""
    return _render("canvas.html", is_second=is_second)


def study(study: Study | None) -> str:
    """The series of a study as buttons, the order of the chosen one, and the files that could not be read."""
    return _render("study.html", study=study, reasons=UNREAD)


def second(study: Study | None) -> str:
    """The state of the second viewport, for its canvas."""
    if study is None or study.second is None:
        return _render("second.html", state="")
    scan = study.series[study.second].scan
    return _render("second.html", state=json.dumps(viewer_state(scan, View(b"", 0, 0, ""))))


def text_boxes(scan: Scan, is_searched: bool) -> str:
    """Burned-in text that was found, with buttons that hide or show it. Empty without the extra ``ocr``."""
    if not is_available():
        return ""
    boxes = scan.text.identifying(scan.frame)
    return _render(
        "text_boxes.html",
        text=scan.text,
        was_changed=bool(scan.text.shown or scan.text.hides_marks),
        is_searched=is_searched,
        boxes=boxes,
        num_hidden=sum(map(scan.text.is_hidden, boxes)),
        marks=scan.text.marks(scan.frame),
        kinds=texts.TEXT_KINDS,
        failed=texts.TEXT_SEARCH_FAILED,
        none_found=texts.NO_TEXT_FOUND,
    )


def facts(scan: Scan | None) -> str:
    """Facts about the image that do not identify a person, and the warning about burned-in text."""
    if scan is None:
        return ""
    is_warning = scan.facts.get("burned_in_annotation") == "YES"
    searched = texts.BURNED_IN_SEARCHED if is_available() else texts.BURNED_IN_NOTE
    note = texts.BURNED_IN_WARNING if is_warning else searched
    return _render("facts.html", scan=scan, rows=describe(scan), note=note, is_warning=is_warning)


def pacs_studies(studies: Sequence[PacsStudy]) -> str:
    """The studies that a search found, as buttons."""
    return _render("pacs.html", studies=studies, series=())


def pacs_series(series: Sequence[PacsSeries]) -> str:
    """The series of a study, as buttons."""
    return _render("pacs.html", studies=None, series=series)


def chat(session: Session | None) -> str:
    """The conversation. Each answer names its image, frame, window and model."""
    messages = [_message(exchange) for exchange in session.exchanges] if session else []
    has_buttons = session is not None and not session.is_answering
    editing = session.editing if session else None
    return _render(
        "chat.html",
        messages=messages,
        placeholder=texts.CHAT_PLACEHOLDER,
        has_buttons=has_buttons,
        editing=editing,
    )


def turn_note(session: Session) -> str:
    """Which question is being edited, or what can be undone. Empty if neither."""
    if session.editing is not None:
        later = len(session.exchanges) - session.editing - 1
        return _render("turn_note.html", number=session.editing + 1, later=later, undo="")
    return _render("turn_note.html", number=0, later=0, undo=session.undo_note) if session.undo_note else ""


def map_progress(running: RunningMap) -> str:
    """The progress of an occlusion map, with the time left."""
    return _render("map_progress.html", share=running.share, left_s=running.left_s)


def report(sections: Sequence[tuple[str, str]], views: Sequence[View], origin: str) -> str:
    """A report draft as one HTML document."""
    notices = {"mark": texts.NOT_CLINICAL, "notice": texts.RESEARCH_NOTICE}
    return _render("report.html", sections=sections, views=views, origin=origin, css=Markup(_export_css()), **notices)


def _export_css() -> str:
    return (files("babydoctor.serve.page") / "static" / "export.css").read_text(encoding="utf-8")


def _message(exchange: Exchange) -> dict[str, Any]:
    answer = exchange.answer.strip()
    return {
        "question": exchange.question,
        "answer": render_answer(answer or ("(no words)" if exchange.ended else "…")),
        "note": texts.ENDINGS.get(exchange.ended, ""),
        "certainty": lines_under_answer(exchange.certainty),
        "thumbnail": exchange.view.thumbnail,
        "source": exchange.source,
        "copy_text": answer if exchange.ended else "",
    }


def sampled_answers(question: str, sentence: str, groups: Sequence[tuple[str, int]]) -> str:
    """Sampled answers to a question: each distinct text with its count."""
    answers = [(f"{count} time{'s' if count > 1 else ''}", text) for text, count in groups]
    return _render("certainty.html", question=question, sentence=sentence, answers=answers)


def answer_without_image(question: str, answer: str, hidden: str, sentence: str) -> str:
    """An answer next to the answer to the same question without the image."""
    answers = [("With the image", answer), ("Without the image", hidden)]
    return _render("certainty.html", question=question, sentence=sentence, answers=answers)


def chips(labels: Iterable[str]) -> str:
    """Suggested questions, as buttons."""
    return _render("chips.html", labels=labels)


def word_buttons(words: Sequence[str]) -> str:
    """The words of an answer as buttons. The first button is for the whole answer."""
    return _render("words.html", words=words)


def overlay(view: View, overlay_url: str, word: str, note: str) -> str:
    """The image under its occlusion map. ``note`` says how reliable the map is."""
    ratio = view.width / view.height
    return _render(
        "overlay.html",
        view=view,
        overlay_url=overlay_url,
        what=f"“{word}”" if word else "the whole answer",
        note=note,
        width_px=round(OVERLAY_HEIGHT_PX * ratio),
        ratio=f"{ratio:.4f}",
    )


def export(data: Mapping[str, Any], exchanges: Sequence[Mapping[str, Any]]) -> str:
    """A session as one HTML document that also contains ``data`` as JSON."""
    # "</" inside a script element would end it.
    block = json.dumps(data, ensure_ascii=False, indent=1).replace("<", "\\u003c")
    return _render("export.html", data=data, exchanges=exchanges, css=Markup(_export_css()), block=Markup(block))
