"""Feedback as JSON lines, and the export of a session as one HTML file with the same data as JSON inside."""

from __future__ import annotations

import base64
import datetime
import fcntl
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babydoctor import __version__
from babydoctor.files import sync
from babydoctor.serve.page import html as show
from babydoctor.serve.page.scan import describe
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.texts import RESEARCH_NOTICE, PageError
from babydoctor.serve.page.viewer.record import pixel_hash

VERDICTS = {"up": "Good", "down": "Bad"}

ERROR_KINDS = {
    "false_finding": "False finding: it names something that is not there",
    "missed_finding": "Missed finding: it does not name something that is there",
    "wrong_place": "Wrong place: side, level or organ",
    "wrong_severity": "Wrong severity or size",
    "style": "Style: wording, length, form",
}

_ENDINGS = {"stopped": " (stopped)", "length": " (cut off at the length limit)", "error": " (interrupted)"}


MAX_COMMENT_CHARS = 10_000

MAX_FILE_BYTES = 2**30
"""Size limit of the feedback file, so that it cannot fill the disk. The operator must move a full file."""


def build_row(
    session: Session, exchange: Exchange, *, verdict: str | None, errors: Sequence[str], comment: str, with_image: bool
) -> dict[str, Any]:
    """One line of feedback. It does not record who gave it or from where.

    ``seconds`` is the time from the display of the whole answer to the feedback.
    """
    facts = session.scan.facts if session.scan else {}
    row: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "version": __version__,
        "model": exchange.model,
        "question": exchange.question,
        "answer": exchange.answer,
        "turn": session.exchanges.index(exchange) + 1,
        "sampling": _sampling(exchange),
        "modality": facts.get("modality"),
        "view": exchange.view.caption or None,
        "verdict": verdict,
        "errors": [kind for kind in ERROR_KINDS if kind in errors],
        "comment": comment.strip()[:MAX_COMMENT_CHARS],
        "seconds": None if exchange.shown_s is None else round(time.monotonic() - exchange.shown_s, 1),
    }
    if with_image:
        row["image_png_base64"] = base64.b64encode(exchange.view.png).decode()
    return row


def save_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a file that only the operator's account can read.

    Raises:
        PageError: the file cannot be written.
    """
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if not is_new and path.stat().st_size + len(line) > MAX_FILE_BYTES:
            raise PageError("feedback_full")
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # also locks out other threads of this process
            written = file.write(line)
            if written != len(line):  # a full disk may accept only a part of the line
                os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - (written or 0))
                raise PageError("not_saved")
            os.fsync(file.fileno())
        if is_new:
            sync(path.parent)  # sync the directory, so that the file's name is on disk, too
    except OSError:
        raise PageError("not_saved") from None


def _sampling(exchange: Exchange) -> dict[str, float]:
    sampling = exchange.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
    }


def export_session(session: Session) -> str:
    """The session as a self-contained HTML document that also contains its data as JSON.

    Raises:
        PageError: there is no answer yet.
    """
    if not session.exchanges:
        raise PageError("no_answer")
    views = list(dict.fromkeys(exchange.view for exchange in session.exchanges))
    facts = describe(session.scan) if session.scan else []
    data = {
        "format": "babydoctor-session-1",
        "version": __version__,
        "exported_at": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "notice": RESEARCH_NOTICE,
        "image": dict(facts),
        "views": [
            {
                "caption": view.caption,
                "width": view.width,
                "height": view.height,
                "pixels_sha256": pixel_hash(view.png),
                "state": view.record.to_json(),
            }
            for view in views
        ],
        "exchanges": [
            {
                "asked_at": exchange.asked_at,
                "model": exchange.model,
                "sampling": _sampling(exchange),
                "image": exchange.image_name,
                "view": views.index(exchange.view),
                "question": exchange.question,
                "turns": [{"role": turn.role, "text": turn.text} for turn in exchange.turns],
                "answer": exchange.answer,
                "ended": exchange.ended,
                "certainty": exchange.certainty,
            }
            for exchange in session.exchanges
        ],
    }
    shown = None
    exchanges = []
    for exchange in session.exchanges:
        sampling = exchange.sampling
        settings = f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
        exchanges.append(
            {
                "new_view": exchange.view if exchange.view is not shown else None,
                "view": views.index(exchange.view),
                "question": exchange.question,
                "answer": exchange.answer,
                "ending": _ENDINGS.get(exchange.ended, ""),
                "meta": f"{exchange.source} · {settings} · {exchange.asked_at}",
            }
        )
        shown = exchange.view
    return show.export(data, exchanges)
