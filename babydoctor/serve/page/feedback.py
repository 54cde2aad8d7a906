"""Feedback as JSON lines, and a session as one file that a browser can show and a program can read."""

from __future__ import annotations

import base64
import datetime
import html
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babydoctor import __version__
from babydoctor.serve.page.errors import PageError
from babydoctor.serve.page.scan import describe
from babydoctor.serve.page.session import Exchange, Session
from babydoctor.serve.page.style import EXPORT_CSS, RESEARCH_NOTICE

VERDICTS = {"up": "Good", "down": "Bad"}

ERROR_KINDS = {
    "false_finding": "False finding: it names something that is not there",
    "missed_finding": "Missed finding: something that is there is not named",
    "wrong_place": "Wrong place: side, level or organ",
    "wrong_severity": "Wrong severity or size",
    "style": "Style: wording, length, form",
}

_lock = threading.Lock()


def build_row(
    session: Session, exchange: Exchange, *, verdict: str | None, errors: Sequence[str], comment: str, with_image: bool
) -> dict[str, Any]:
    """One line of feedback. Nothing in it says who gave it or from where."""
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
        "comment": comment.strip(),
    }
    if with_image:
        row["image_png_base64"] = base64.b64encode(exchange.view.png).decode()
    return row


def save_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a file that only the operator's account can read.

    Raises:
        PageError: it cannot be written.
    """
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        with _lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(line)
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
    """The session as an HTML document that needs nothing from outside, with the same as JSON inside.

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
        "views": [{"caption": view.caption, "width": view.width, "height": view.height} for view in views],
        "exchanges": [
            {
                "asked_at": exchange.asked_at,
                "model": exchange.model,
                "sampling": _sampling(exchange),
                "view": views.index(exchange.view),
                "question": exchange.question,
                "answer": exchange.answer,
                "ended": exchange.ended,
            }
            for exchange in session.exchanges
        ],
    }
    parts = [
        f"<h1>BabyDoctor session</h1><p class=notice>{html.escape(RESEARCH_NOTICE)}</p>",
        f"<p class=meta>Exported {data['exported_at']} · BabyDoctor {__version__}</p>",
        "<dl>" + "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts) + "</dl>",
    ]
    shown = None
    for exchange in session.exchanges:
        if exchange.view is not shown:
            shown = exchange.view
            caption = html.escape(shown.caption or "as loaded")
            parts.append(
                f'<figure><img src="{shown.data_url}" alt="the image as the model got it">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        sampling = exchange.sampling
        meta = (
            f"{exchange.model} · temperature {sampling.temperature:g}, top-p {sampling.top_p:g} · {exchange.asked_at}"
        )
        ended = {"stopped": " (stopped)", "length": " (cut at the set length)", "error": " (broken off)"}
        parts.append(
            f"<section><h2>{html.escape(exchange.question)}</h2><p class=answer>{html.escape(exchange.answer)}"
            f"<em>{ended.get(exchange.ended, '')}</em></p><p class=meta>{html.escape(meta)}</p></section>"
        )
    # "</" inside a script would end it.
    block = json.dumps(data, ensure_ascii=False, indent=1).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang=en><meta charset="utf-8"><meta name=viewport content="width=device-width">'
        f"<title>BabyDoctor session</title><style>{EXPORT_CSS}</style><body>{''.join(parts)}"
        f'<script type="application/json" id="session">{block}</script></body></html>'
    )
