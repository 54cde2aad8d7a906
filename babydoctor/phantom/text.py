"""Text about a phantom: captions, lay conversations, terse reports, and the closed questions of the evaluation.

The same truth is described in three ways, as in the real stages: a caption like a web image's (stage 1), full
sentences in everyday words like LLaVA-Instruct (stage 2), and a few words in radiology terms like ROCO (stage 3).
Stages 2 and 3 share the closed questions and differ in the answers, so a score shows what stage 3 changed.
"""

from __future__ import annotations

import numpy as np

from babydoctor.phantom.case import Case
from babydoctor.schema import IMAGE_TOKEN

KINDS = ("modality", "finding", "side", "level")
"""The kinds of closed questions. The evaluation asks about side and level only if there is a finding."""

# The evaluation asks the first wording of each kind. ``wordings.yaml`` holds further wordings for training.
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

LAY_ANSWERS: dict[str, str] = {
    "modality": "This is {}.",
    "finding": "I can see {} here.",
    "side": "It is on the patient's {} side.",
    "level": "It lies {} of the chest.",
}
"""One form for each kind. With two, the model could only guess at the first token in which they differ."""

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
OUTSIDE = "I can only answer questions about the scan and its finding."
"""The reply to a question that a phantom cannot answer."""


def caption(case: Case) -> str:
    """One line about a case, like the alt text of an image on the web. Equal truths have equal captions."""
    start = f"{LAY['modality'][case.modality]} of a chest with"
    if case.finding == "none":
        return f"{start} nothing unusual"
    return f"{start} {LAY['finding'][case.finding]} on the {case.side} side {LAY['level'][str(case.level)]}"


def report(case: Case) -> str:
    """The terse report of a case in radiology terms."""
    modality = _REPORT_MODALITY[case.modality]
    if case.finding == "none":
        return f"{modality}. No abnormality."
    zone = f"{case.side} {TERMS['level'][str(case.level)].lower()}"
    return f"{modality} shows a {_REPORT_FINDING[case.finding]} in the {zone}."


def record(case: Case, rng: np.random.Generator) -> str:
    """A case as a structured form: a field and a radiology term on each line, in random order."""
    fields = [("Modality", "modality"), ("Finding", "finding"), ("Side", "side"), ("Level", "level")]
    lines = [f"{name}: {term_reply(kind, case)}" for name, kind in [*fields, ("Location", "location")]]
    return "\n".join(lines[i] for i in rng.permutation(len(lines)))


def truth_of(case: Case, kind: str) -> str | None:
    """The true value of a case for one kind of question, or None if the question does not apply."""
    value = getattr(case, kind)
    assert value is None or value in TERMS[kind], (case, kind)
    return value


def asked_kinds(case: Case) -> tuple[str, ...]:
    """The kinds of closed questions that apply to a case."""
    return tuple(kind for kind in KINDS if truth_of(case, kind) is not None)


def lay_answer(kind: str, value: str) -> str:
    """Answer a closed question with a full sentence in everyday words."""
    return LAY_ANSWERS[kind].format(LAY[kind][value])


def lay_description(case: Case) -> str:
    """Two or three sentences in everyday words."""
    start = f"This is {LAY['modality'][case.modality]} of a chest."
    if case.finding == "none":
        return f"{start} There is nothing unusual in it."
    noun = LAY["finding"][case.finding]
    place = f"on the patient's {case.side} side, {LAY['level'][str(case.level)]}"
    return f"{start} There is {noun} in it, {place}."


def lay_reply(kind: str, case: Case) -> str:
    """Reply to a request in everyday words."""
    if kind == "outside":
        return OUTSIDE
    if kind == "report":
        return lay_description(case)
    if kind != "modality" and case.finding == "none":
        return lay_answer("finding", "none")
    if kind == "location":
        return f"It is on the patient's {case.side} side, {LAY['level'][str(case.level)]} of the chest."
    return lay_answer(kind, str(truth_of(case, kind)))


def term_reply(kind: str, case: Case) -> str:
    """Reply to a request in radiology terms."""
    if kind == "outside":
        return OUTSIDE
    if kind == "report":
        return report(case)
    if kind != "modality" and case.finding == "none":
        return TERMS["finding"]["none"]
    if kind == "location":
        return f"{str(case.side).capitalize()} {TERMS['level'][str(case.level)].lower()}"
    return TERMS[kind][str(truth_of(case, kind))]
