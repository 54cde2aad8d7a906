"""Text about a phantom: captions, lay conversations, terse reports, and the closed questions of the evaluation.

The same truth is described in three ways, as in the real stages: a caption like a web image's (stage 1), full
sentences in everyday words like LLaVA-Instruct (stage 2), and a few words in radiology terms like ROCO (stage 3).
Stages 2 and 3 share the closed questions and differ in the answers, so a score shows what stage 3 changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from babydoctor.phantom.asking import ask
from babydoctor.phantom.case import Case
from babydoctor.schema import IMAGE_TOKEN

KINDS = ("modality", "finding", "side", "level")
"""The kinds of closed questions. The evaluation asks about side and level only where there is a finding."""

REQUESTS = {
    "modality": 1.0,
    "finding": 1.4,
    "side": 1.1,
    "level": 1.1,
    "location": 0.4,
    "report": 0.6,
    "outside": 0.9,
}
"""Kinds of requests in a conversation and how often they come, relative to each other."""

# The evaluation asks the first wording. ``wordings.yaml`` holds the others that are trained on.
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

OUTSIDE = "I can only answer questions about the kind of scan, the finding, its side and its height."
"""The reply to a question that a phantom cannot answer."""

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
    return f"{start} {LAY['finding'][case.finding]} on the {case.side} side {LAY['level'][str(case.level)]}"


def reports(case: Case) -> tuple[str, ...]:
    """The terse reports of a case in radiology terms; each says the same."""
    modality = _REPORT_MODALITY[case.modality]
    if case.finding == "none":
        return (f"{modality}. No abnormality.",)
    zone = f"{case.side} {TERMS['level'][str(case.level)].lower()}"
    finding = _REPORT_FINDING[case.finding]
    return f"{modality} shows a {finding} in the {zone}.", f"{modality}. {finding.capitalize()}, {zone}."


def report(case: Case, rng: np.random.Generator) -> str:
    """One of the case's reports."""
    choices = reports(case)
    return choices[int(rng.integers(len(choices)))]


def record(case: Case, rng: np.random.Generator) -> str:
    """A case as a form in a database has it: a field and a radiology term on each line, in any order."""
    fields = [("Modality", "modality"), ("Finding", "finding"), ("Side", "side"), ("Level", "level")]
    lines = [f"{name}: {term_replies(kind, case)[0]}" for name, kind in [*fields, ("Location", "location")]]
    return "\n".join(lines[i] for i in rng.permutation(len(lines)))


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
    return f"{start} There is {noun} in it, {place}."


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


def draw_requests(case: Case, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(kind, question) of a conversation about a case: three to six requests in any wording and order.

    A kind may come twice or not at all, so a question cannot be guessed from those before it.
    """
    weights = dict(REQUESTS)
    if case.finding == "none":  # side and level of nothing are asked, but not often
        weights |= {kind: 0.3 * weights[kind] for kind in ("side", "level", "location")}
    shares = np.array(list(weights.values()))
    kinds = rng.choice(list(weights), size=int(rng.integers(3, 7)), p=shares / shares.sum())
    return [(str(kind), request(str(kind), case, rng)) for kind in kinds]


def request(kind: str, case: Case, rng: np.random.Generator) -> str:
    """A question of one kind in a wording that may be trained on, often the one that the evaluation asks."""
    if kind in QUESTIONS and rng.random() < 0.2:
        return QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
    return ask(kind, case.finding, rng)


def lay_reply(kind: str, case: Case, rng: np.random.Generator) -> str:
    """Reply to a request in everyday words."""
    if kind == "outside":
        return OUTSIDE
    if kind == "report":
        return lay_description(case)
    if kind != "modality" and case.finding == "none":
        return lay_answer("finding", "none", rng)
    if kind == "location":
        return f"It is on the patient's {case.side} side, {LAY['level'][str(case.level)]} of the chest."
    return lay_answer(kind, str(truth_of(case, kind)), rng)


def term_replies(kind: str, case: Case) -> tuple[str, ...]:
    """The right replies to a request in radiology terms: the reports for "report", one for the other kinds."""
    if kind == "outside":
        return (OUTSIDE,)
    if kind == "report":
        return reports(case)
    if kind != "modality" and case.finding == "none":
        return (TERMS["finding"]["none"],)
    if kind == "location":
        return (f"{str(case.side).capitalize()} {TERMS['level'][str(case.level)].lower()}",)
    return (TERMS[kind][str(truth_of(case, kind))],)


def term_reply(kind: str, case: Case, rng: np.random.Generator) -> str:
    """Reply to a request in radiology terms."""
    choices = term_replies(kind, case)
    return choices[int(rng.integers(len(choices)))]


def lay_turns(case: Case, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions about a case, answered in full sentences."""
    turns = [(question, lay_reply(kind, case, rng)) for kind, question in draw_requests(case, rng)]
    if case.finding != "none" and rng.random() < 0.1:
        turns.append(_WORRY)
    return turns


def instruct_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows as in LLaVA-Instruct: a conversation of several turns, and for some cases a detailed description."""
    rows = [_row(case, "chat", lay_turns(case, rng), rng)]
    if rng.random() < 0.25:
        question = _DESCRIBE[int(rng.integers(len(_DESCRIBE)))]
        rows.append(_row(case, "detail", [(question, lay_description(case))], rng))
    if rng.random() < 0.05:
        rows.append(_general_row(case, rng))
    return rows


def radiology_rows(case: Case, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row as in roco-instruct (question and report), and a row of questions answered in radiology terms."""
    turns = [(question, term_reply(kind, case, rng)) for kind, question in draw_requests(case, rng)]
    question = REPORT_QUESTION.split("\n")[0] if rng.random() < 0.5 else request("report", case, rng)
    rows = [_row(case, "report", [(question, report(case, rng))], rng), _row(case, "closed", turns, rng)]
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
