"""The demo's score table, from the evaluations of its stages, and what the last stage must reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from babydoctor.markers import markdown_table
from babydoctor.phantom.text import KINDS

CONDITIONS = ("right", "shuffled", "blank")
"""Image conditions of the evaluation, see ``eval/conditions.py``."""

HEAD = ("after", "image", *KINDS, "all", "in radiology terms")
IN_TERMS = "closed_accuracy_in_radiology_terms"
SECTION = "demo scores"
"""Name of the markers around the table in a Markdown file."""


@dataclass(frozen=True)
class Thresholds:
    """What the last stage must reach on held-out phantoms.

    Attributes:
        accuracy: of all questions, answered in radiology terms with the right image.
        accuracy_per_kind: of the questions of each kind.
        from_chance: largest distance from chance over all questions when images are shuffled.
        from_chance_per_kind: the same for each kind; three standard errors of about 400 questions.
        in_terms_before: largest accuracy in radiology terms before the last stage, which teaches the terms.
    """

    accuracy: float = 0.85
    accuracy_per_kind: float = 0.75
    from_chance: float = 0.05
    from_chance_per_kind: float = 0.08
    in_terms_before: float = 0.05


def accuracies(metrics: Mapping[str, Any], condition: str) -> dict[str, float]:
    """Accuracy of each kind of question, of "all", and of all "in radiology terms", under one image condition."""
    scored = metrics["conditions"][condition]
    by_kind = scored["by_group"]["question_type"]
    figures = scored["figures"]
    return {
        **{kind: by_kind[kind]["closed_accuracy"]["value"] for kind in KINDS},
        "all": figures["closed_accuracy"]["value"],
        "in radiology terms": figures[IN_TERMS]["value"],
    }


def chance(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Chance for each kind of question and for "all", as the evaluation defines it (``score.score_chance``)."""
    return {**metrics["chance"]["by_question_type"], "all": metrics["chance"]["closed_accuracy"]}


def table_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows under ``HEAD``: each stage under each image condition, then chance."""
    rows = []
    for stage, metrics in stages.items():
        for condition in CONDITIONS:
            values = accuracies(metrics, condition)
            rows.append([stage, condition, *(f"{100 * values[name]:.1f}" for name in HEAD[2:])])
    by_chance = chance(next(iter(stages.values())))
    rows.append(["chance", "", *(f"{100 * by_chance[name]:.1f}" for name in (*KINDS, "all")), ""])
    return rows


def to_markdown(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown, with a sentence that explains it."""
    metrics = next(iter(stages.values()))
    lines = markdown_table(HEAD, table_rows(stages))
    note = (
        f"Percent correct of {metrics['num_questions']:,} closed questions about {metrics['num_images']} held-out "
        "phantoms, whole answers only. Chance is the best constant answer to each kind of question."
    )
    return "\n".join([*lines, "", note])


def shortfalls(last: Mapping[str, Any], before: Mapping[str, Any], thresholds: Thresholds | None = None) -> list[str]:
    """What the last stage's evaluation lacks, in words. Empty if it reaches all thresholds.

    Args:
        last, before: ``metrics.json`` of the last stage and of the stage before it.
    """
    limits = thresholds or Thresholds()
    right, shuffled, by_chance = accuracies(last, "right"), accuracies(last, "shuffled"), chance(last)
    found = []
    if right["in radiology terms"] < limits.accuracy:
        found.append(f"accuracy in radiology terms is {right['in radiology terms']:.1%}, below {limits.accuracy:.0%}")
    for name in (*KINDS, "all"):
        if name != "all" and right[name] < limits.accuracy_per_kind:
            found.append(f"{name}: accuracy is {right[name]:.1%}, below {limits.accuracy_per_kind:.0%}")
        limit = limits.from_chance if name == "all" else limits.from_chance_per_kind
        if abs(shuffled[name] - by_chance[name]) > limit:
            found.append(
                f"{name}: {shuffled[name]:.1%} with shuffled images is more than {limit:.0%} from chance "
                f"({by_chance[name]:.1%})"
            )
    spoke = accuracies(before, "right")["in radiology terms"]
    if spoke > limits.in_terms_before:
        found.append(f"{spoke:.1%} are in radiology terms before the last stage, above {limits.in_terms_before:.0%}")
    return found
