"""Rows of the three training sets about a phantom: requests in many wordings, and the replies.

The texts themselves are in ``text.py``, the wordings in ``asking.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from babydoctor.phantom.asking import ask
from babydoctor.phantom.case import Case
from babydoctor.phantom.text import (
    QUESTIONS,
    REPORT_QUESTION,
    TERMS,
    asked_kinds,
    caption,
    lay_description,
    lay_reply,
    report,
    term_reply,
    truth_of,
)
from babydoctor.schema import IMAGE_TOKEN

REQUESTS = {
    "modality": 1.0,
    "finding": 1.4,
    "side": 1.1,
    "level": 1.1,
    "location": 0.7,
    "report": 0.6,
    "outside": 1.8,
}
"""Kinds of requests in a conversation and how often they come, relative to each other."""

REPORT_REQUESTS = (REPORT_QUESTION.split("\n")[0], "Describe the image.", "What does the image show?")
"""roco-instruct's question, and those that the web UI offers."""

_DESCRIBE = ("Please describe this picture.", "Can you explain to me what this picture shows?")
_WORRY = ("Should I worry about it?", "Please show it to a doctor. I am a research model and no doctor.")

GENERAL: tuple[tuple[str, str], ...] = (
    ("Who are you?", "I am BabyDoctor, a small research model. I am no doctor."),
    ("Hello!", "Hello! You can show me a scan and ask me about it."),
    (
        "Why is the left side of the patient on the right of the picture?",
        "Because the picture is seen as if the patient stood in front of you.",
    ),
    ("What is a magnet scan?", "It is a picture that is made with a strong magnet and radio waves."),
    ("What is a CAT scan?", "It is a picture that is made from many X-ray pictures around the body."),
    ("What is an ultrasound picture?", "It is a picture that is made from the echoes of sound in the body."),
    ("Can you treat me?", "No. Please talk to a doctor."),
)
"""Text-only conversations, mixed into the instruction set."""


def _with_image(question: str, rng: np.random.Generator) -> str:
    # LLaVA's data sets put the image before or after the text.
    return f"{IMAGE_TOKEN}\n{question}" if rng.random() < 0.5 else f"{question}\n{IMAGE_TOKEN}"


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text}
        for question, answer in turns
        for speaker, text in (("human", question), ("gpt", answer))
    ]


def _row(case: Case, suffix: str, turns: list[tuple[str, str]], rng: np.random.Generator) -> dict[str, Any]:
    turns = [(_with_image(turns[0][0], rng), turns[0][1]), *turns[1:]]
    return {"id": f"{case.id}-{suffix}", "image": case.image, "conversations": _conversation(turns)}


def _general_row(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    general = GENERAL[int(rng.integers(len(GENERAL)))]
    return {"id": f"{case.id}-general", "conversations": _conversation([general])}


def align_row(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """A row as in LCS-558K: a request and one caption."""
    return _row(case, "caption", [("Give a brief description of the image.", caption(case))], rng)


def draw_requests(case: Case, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """(kind, question) of a conversation about a case: ``count`` requests in any wording and order.

    A kind may come twice or not at all, so a question cannot be guessed from those before it.
    """
    weights = dict(REQUESTS)
    if case.finding == "none":  # sometimes ask for side and level although there is no finding
        weights |= {kind: 0.3 * weights[kind] for kind in ("side", "level", "location")}
    shares = np.array(list(weights.values()))
    kinds = rng.choice(list(weights), size=count, p=shares / shares.sum())
    return [(str(kind), request(str(kind), case, rng)) for kind in kinds]


def request(kind: str, case: Case, rng: np.random.Generator) -> str:
    """A question of one kind in a training wording, often one that the web UI or the evaluation uses."""
    ready_made = REPORT_REQUESTS if kind == "report" else QUESTIONS.get(kind, ())
    if ready_made and rng.random() < 0.3:
        return ready_made[int(rng.integers(len(ready_made)))]
    return ask(kind, case.finding, rng)


def lay_turns(case: Case, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Questions about a case, answered in full sentences."""
    return [(question, lay_reply(kind, case)) for kind, question in draw_requests(case, rng, count)]


def term_turns(case: Case, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Questions about a case, answered in radiology terms."""
    return [(question, term_reply(kind, case)) for kind, question in draw_requests(case, rng, count)]


def instruct_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows as in LLaVA-Instruct: conversations of one and of several turns, and a detailed description for some."""
    rows = [_row(case, f"question{number}", lay_turns(case, rng, number), rng) for number in (1, 2)]
    turns = lay_turns(case, rng, int(rng.integers(2, 6)))
    if case.finding != "none" and rng.random() < 0.1:
        turns.append(_WORRY)
    rows.append(_row(case, "chat", turns, rng))
    if rng.random() < 0.25:
        question = _DESCRIBE[int(rng.integers(len(_DESCRIBE)))]
        rows.append(_row(case, "detail", [(question, lay_description(case))], rng))
    if rng.random() < 0.05:
        rows.append(_general_row(case, rng))
    return rows


def radiology_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row as in roco-instruct (question and report), and rows of questions answered in radiology terms."""
    rows = [_row(case, "report", [(request("report", case, rng), report(case))], rng)]
    rows += [_row(case, f"question{number}", term_turns(case, rng, number), rng) for number in (1, 2)]
    rows.append(_row(case, "closed", term_turns(case, rng, int(rng.integers(2, 6))), rng))
    if rng.random() < 0.05:
        rows.append(_general_row(case, rng))
    return rows


def question_rows(case: Case) -> list[dict[str, Any]]:
    """Closed questions about a held-out case: ``id``, ``image``, ``kind``, ``question``, ``truth`` and ``answer``."""
    return [
        {
            "id": f"{case.id}-{kind}",
            "image": case.image,
            "kind": kind,
            "question": f"{IMAGE_TOKEN}\n{QUESTIONS[kind][0]}",
            "truth": truth_of(case, kind),
            "answer": TERMS[kind][str(truth_of(case, kind))],
        }
        for kind in asked_kinds(case)
    ]
