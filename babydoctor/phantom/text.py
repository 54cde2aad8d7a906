"""Text about a phantom: captions, lay conversations, terse reports, and the closed questions of the evaluation.

The same truth is described in three ways, as in the real stages: a caption like a web image's (stage 1), full
sentences in everyday words like LLaVA-Instruct (stage 2), and a few words in radiology terms like ROCO (stage 3).
Stages 2 and 3 share the closed questions and differ in the answers, so a score shows what stage 3 changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from babydoctor.phantom.case import Case
from babydoctor.schema import IMAGE_TOKEN

KINDS = ("modality", "finding", "side", "level")
"""The kinds of closed questions. Side and level are asked only about cases with a finding."""

# The evaluation asks the first wording.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "modality": ("What kind of scan is this?", "How was this picture made?"),
    "finding": ("What is the main finding?", "What stands out in this picture?"),
    "side": ("On which side of the patient is the finding?", "Is the finding on the left or on the right?"),
    "level": ("At what height is the finding?", "How high up does the finding lie?"),
}

TERMS: dict[str, dict[str, str]] = {
    "modality": {"radiograph": "Radiograph", "ct": "CT", "mr": "MRI", "ultrasound": "Sonogram"},
    "finding": {
        "none": "No abnormality",
        "nodule": "Nodule",
        "cyst": "Cyst",
        "effusion": "Effusion",
        "fracture": "Fracture",
    },
    "side": {"left": "Left", "right": "Right"},
    "level": {"upper": "Upper zone", "middle": "Mid zone", "lower": "Lower zone"},
}
"""Radiology terms: the exact answers to the closed questions after stage 3."""

LAY: dict[str, dict[str, str]] = {
    "modality": {
        "radiograph": "an X-ray picture",
        "ct": "a CAT scan",
        "mr": "a magnet scan",
        "ultrasound": "an ultrasound picture",
    },
    "finding": {
        "none": "nothing unusual",
        "nodule": "a solid lump",
        "cyst": "a hollow bubble",
        "effusion": "a pool of fluid",
        "fracture": "a broken rib",
    },
    "side": {"left": "left", "right": "right"},
    "level": {"upper": "near the top", "middle": "around the middle", "lower": "near the bottom"},
}
"""Everyday words for the same values, used by stages 1 and 2."""

LAY_ANSWERS: dict[str, tuple[str, ...]] = {
    "modality": ("This is {}.", "It looks like {} to me."),
    "finding": ("I can see {} here.", "There is {} in it."),
    "side": ("It is on the patient's {} side.", "You find it on the {} of the patient."),
    "level": ("It lies {} of the chest.", "It sits {} of the chest."),
}

REPORT_QUESTION = f"The following image is a radiology scan. Deeply analyze and diagnose this image.\n{IMAGE_TOKEN}"
"""The question of every roco-instruct row."""

_REPORT_MODALITY = {
    "radiograph": "Chest radiograph",
    "ct": "Coronal chest CT",
    "mr": "Coronal chest MRI",
    "ultrasound": "Chest sonogram",
}
_REPORT_FINDING = {
    "nodule": "solid nodule",
    "cyst": "thin-walled cyst",
    "effusion": "loculated effusion",
    "fracture": "displaced rib fracture",
}
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


def caption(case: Case) -> str:
    """One line about a case, like the alt text of an image on the web. Equal truths have equal captions."""
    start = f"{LAY['modality'][case.modality]} of a chest with"
    if case.finding == "none":
        return f"{start} nothing unusual"
    noun = LAY["finding"][case.finding].removeprefix("a ")
    return f"{start} a {case.size} {noun} on the {case.side} side {LAY['level'][str(case.level)]}"


def report(case: Case, rng: np.random.Generator) -> str:
    """A terse report in radiology terms."""
    modality = _REPORT_MODALITY[case.modality]
    if case.finding == "none":
        return f"{modality}. No abnormality."
    zone = f"{case.side} {TERMS['level'][str(case.level)].lower()}"
    # A tiny model cannot measure to the millimeter, and real reports round too.
    millimeters = 10 * round(case.size_mm / 10) if case.size_mm else 0
    finding = _REPORT_FINDING[case.finding]
    if rng.random() < 0.5:
        return f"{modality} shows a {finding} in the {zone}, about {millimeters} mm."
    return f"{modality}. {finding.capitalize()}, {zone}, about {millimeters} mm."


def truth_of(case: Case, kind: str) -> str | None:
    """The true value of a case for one kind of question, or None if the question does not apply."""
    value = getattr(case, kind)
    assert value is None or value in TERMS[kind], (case, kind)
    return value


def asked_kinds(case: Case) -> tuple[str, ...]:
    """The kinds of closed questions that apply to a case."""
    return tuple(kind for kind in KINDS if truth_of(case, kind) is not None)


def lay_answer(kind: str, value: str, rng: np.random.Generator) -> str:
    """Answer a closed question with a full sentence in everyday words."""
    answers = LAY_ANSWERS[kind]
    return answers[int(rng.integers(len(answers)))].format(LAY[kind][value])


def lay_description(case: Case) -> str:
    """Two or three sentences in everyday words."""
    start = f"This is {LAY['modality'][case.modality]} of a chest."
    if case.finding == "none":
        return f"{start} There is nothing unusual in it."
    noun = LAY["finding"][case.finding]
    place = f"on the patient's {case.side} side, {LAY['level'][str(case.level)]}"
    return f"{start} There is {noun} in it, {place}. It is {case.size}."


def _with_image(question: str, rng: np.random.Generator) -> str:
    # LLaVA's data sets put the image before or after the text.
    return f"{IMAGE_TOKEN}\n{question}" if rng.random() < 0.5 else f"{question}\n{IMAGE_TOKEN}"


def _conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": text}
        for question, answer in turns
        for speaker, text in (("human", question), ("gpt", answer))
    ]


def _row(case: Case, suffix: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": f"{case.id}-{suffix}", "image": case.image, "conversations": _conversation(turns)}


def align_row(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    """A row as in LCS-558K: a request and one caption."""
    return _row(case, "caption", [(_with_image("Give a brief description of the image.", rng), caption(case))])


def _shuffled_questions(case: Case, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(kind, question) of all closed questions that apply, in random order and random wording."""
    kinds = asked_kinds(case)
    order = [kinds[i] for i in rng.permutation(len(kinds))]
    return [(kind, QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]) for kind in order]


def lay_turns(case: Case, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Closed questions about a case in random order, answered in full sentences."""
    turns = [
        (question, lay_answer(kind, str(truth_of(case, kind)), rng))
        for kind, question in _shuffled_questions(case, rng)
    ]
    if case.finding != "none" and rng.random() < 0.1:
        turns.append(_WORRY)
    return turns


def instruct_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows as in LLaVA-Instruct: a conversation of several turns, and for some cases a detailed description."""
    turns = lay_turns(case, rng)
    turns[0] = (_with_image(turns[0][0], rng), turns[0][1])
    rows = [_row(case, "chat", turns)]
    if rng.random() < 0.25:
        question = _DESCRIBE[int(rng.integers(len(_DESCRIBE)))]
        rows.append(_row(case, "detail", [(_with_image(question, rng), lay_description(case))]))
    if rng.random() < 0.03:
        general = GENERAL[int(rng.integers(len(GENERAL)))]
        rows.append({"id": f"{case.id}-general", "conversations": _conversation([general])})
    return rows


def radiology_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row as in roco-instruct (question and report), and a row of closed questions answered in radiology terms."""
    turns = [(question, TERMS[kind][str(truth_of(case, kind))]) for kind, question in _shuffled_questions(case, rng)]
    turns[0] = (_with_image(turns[0][0], rng), turns[0][1])
    return [_row(case, "report", [(REPORT_QUESTION, report(case, rng))]), _row(case, "closed", turns)]


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
