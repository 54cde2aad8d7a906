"""What a scorer gives to answers that never looked: constant answers and majorities.

The majorities are read off the references that are scored, so they are the strongest constants there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from babydoctor.eval.metrics import most_frequent
from babydoctor.eval.tasks import Question

CONSTANTS = {
    "always yes": "yes",
    "always no": "no",
    "yes no": "yes no",
    "appears normal": "The image appears normal",
}
"""The last two are traps: they score high under published definitions (see ``published.py``) and must not here."""


def baseline_answers(questions: Sequence[Question]) -> dict[str, list[str]]:
    """The answers of each baseline to the questions, in their order."""
    first_references = [question.references[0] for question in questions]
    answers = {} if all(question.kind == "caption" for question in questions) else dict(CONSTANTS)
    answers["most frequent answer"] = most_frequent(first_references)
    constant = {name: [answer] * len(questions) for name, answer in answers.items()}
    if any("question_type" in question.groups for question in questions):
        constant["majority per question type"] = majority_per_type(questions)
    return constant


def majority_per_type(questions: Sequence[Question]) -> list[str]:
    """For each question the most frequent answer to questions of its type and kind."""
    by_type: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        by_type[_type(question)].append(question.references[0])
    majority = {key: most_frequent(answers) for key, answers in by_type.items()}
    return [majority[_type(question)] for question in questions]


def _type(question: Question) -> tuple[str, str]:
    return question.groups.get("question_type", ""), question.kind
