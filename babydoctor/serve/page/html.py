"""Pieces of HTML that show a session. Everything that comes from outside is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from babydoctor.serve.page.scan import Scan, View, describe
from babydoctor.serve.page.session import Session
from babydoctor.serve.page.style import BURNED_IN_NOTE, BURNED_IN_WARNING, RESEARCH_NOTICE

BANNER = f'<div class="bd-banner" role="note">{html.escape(RESEARCH_NOTICE)}</div>'

TITLE = (
    '<div class="bd-title"><h1>BabyDoctor</h1><p>Ask a small radiology vision-language model about one image</p></div>'
)

QUESTIONS = (
    "What kind of scan is this?",
    "What is the main finding?",
    "On which side of the patient is the finding?",
    "Describe the image.",
)

_ENDINGS = {
    "stopped": "Stopped by you.",
    "length": "Cut off at the set length; “Longest answer” under Settings makes room for more.",
}


def status(text: str, kind: str = "error") -> str:
    """A line above the question box that screen readers announce; empty text shows nothing."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="bd-status {kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def viewer(view: View | None) -> str:
    """The image as the model gets it."""
    if view is None:
        return (
            '<div class="bd-view"><div class="bd-empty">No image yet. Load one above, or choose an example.</div></div>'
        )
    caption = html.escape(view.caption or "as loaded")
    return (
        '<figure class="bd-view"><div class="bd-stage">'
        f'<img class="bd-main" src="{view.data_url}" alt="The loaded image, as the model gets it"></div>'
        f"<figcaption>What the model gets · {caption}</figcaption></figure>"
    )


def facts(scan: Scan | None) -> str:
    """What may be told about the image, and the warning about burned-in text."""
    if scan is None:
        return ""
    pairs = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in describe(scan))
    notes = []
    if scan.num_identifying:
        notes.append(
            f'<p class="bd-note">The file’s header holds {scan.num_identifying} identifying tags. They are not shown, '
            "not logged and not sent to the model.</p>"
        )
    if scan.facts.get("burned_in_annotation") == "YES":
        notes.append(f'<p class="bd-note strong">{html.escape(BURNED_IN_WARNING)}</p>')
    else:
        notes.append(f'<p class="bd-note">{html.escape(BURNED_IN_NOTE)}</p>')
    if scan.truth:
        notes.append(
            '<details class="bd-note"><summary>What was drawn in this phantom</summary>'
            f"{html.escape(scan.truth)}</details>"
        )
    title = f"<div><dt>Example</dt><dd>{html.escape(scan.title)}</dd></div>" if scan.title else ""
    return f'<dl class="bd-facts">{title}{pairs}</dl>{"".join(notes)}'


def messages(session: Session) -> list[dict[str, Any]]:
    """The conversation for Gradio's chatbot."""
    shown: list[dict[str, Any]] = []
    for exchange in session.exchanges:
        shown.append({"role": "user", "content": exchange.question})
        answer = exchange.answer.strip()
        note = exchange.note or _ENDINGS.get(exchange.ended, "")
        if not answer:
            answer = "…" if not exchange.ended else "(no words)"
        shown.append({"role": "assistant", "content": f"{answer}\n\n({note})" if note else answer})
    return shown


def chips(labels: Iterable[str], key: str) -> str:
    """Buttons that carry their label as ``data-<key>``."""
    buttons = (
        f'<button type="button" data-{key}="{html.escape(label)}">{html.escape(label)}</button>' for label in labels
    )
    return f'<div class="bd-chips" role="group" aria-label="Questions to begin with">{"".join(buttons)}</div>'


def word_buttons(words: Sequence[str]) -> str:
    """The answer's words as buttons; the first stands for all of it."""
    buttons = (
        f'<button type="button" data-word="{index}" aria-pressed="{str(index == 0).lower()}">'
        f"{html.escape(word) if index else 'Whole answer'}</button>"
        for index, word in enumerate(words)
    )
    label = "Words of the answer"
    return f'<div class="bd-chips bd-words" role="group" aria-label="{label}">{"".join(buttons)}</div>'


def overlay(view: View, overlay_url: str, word: str) -> str:
    """The image with the overlay on it."""
    what = f"“{html.escape(word)}”" if word else "the whole answer"
    ratio = view.width / view.height
    size = f"width:min(100%,{380 * ratio:.0f}px);aspect-ratio:{ratio:.4f}"
    return (
        f'<div class="bd-overlay"><div class="bd-pair" style="{size}">'
        f'<img src="{view.data_url}" alt="The image">'
        f'<img src="{overlay_url}" alt="Where the model looked for {what}"></div>'
        f'<p>Attention for {what}: less<span class="bd-scale"></span>more</p></div>'
    )
