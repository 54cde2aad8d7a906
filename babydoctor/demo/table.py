"""The demo's score table, from the evaluations of its stages, and the thresholds of the last stage."""

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
"""Name of the markers around the tables in a Markdown file."""

ROBUSTNESS_ROWS = {
    "trained": "trained wordings",
    "held-out": "held-out wordings",
    "84 px": "drawn at 84 px",
    "224 px": "drawn at 224 px",
    "512 px": "drawn at 512 px",
    "temperature 1": "temperature 1",
}
"""Groups of questions of ``robustness.py`` and their names in the table."""

ROBUSTNESS_HEAD = ("radiology, asked", *KINDS, "location", "report", "all", "outside, declined")


@dataclass(frozen=True)
class Thresholds:
    """What the last stage must reach on held-out phantoms, so that ``demo --check`` notices when it gets worse.

    The goals are higher: 0.95 for ``accuracy`` and ``noticed``, 0.9 for ``held_out_wordings``, ``declined``,
    ``at_temperature_1`` and ``near_finding``, 0.05 for ``false_alarms``. ``declined`` rests on 64 questions and
    ``near_finding`` on 40 maps, so their standard error is 5 points.

    Attributes:
        accuracy: of all questions, answered in radiology terms with the right image.
        accuracy_per_kind: of the questions of each kind.
        from_chance: largest distance from chance over all questions when images are shuffled.
        from_chance_per_kind: the same for each kind; three standard errors of about 400 questions.
        in_terms_before: largest accuracy in radiology terms before the last stage, which teaches the terms.
        held_out_wordings: accuracy with held-out wordings, as a share of the accuracy with trained wordings.
        declined: share of outside questions that are declined.
        between_sizes: largest difference in accuracy between images of 84 px and larger ones.
        at_temperature_1: share of right answers at temperature 1.
        near_finding: share of occlusion maps with their peak on the finding or within half a patch of it.
        noticed: share of each kind of unfamiliar images that is noticed.
        false_alarms: share of held-out phantoms that count as unfamiliar.
        calibration_error: expected calibration error of the confidence of closed answers.
    """

    accuracy: float = 0.93
    accuracy_per_kind: float = 0.85
    from_chance: float = 0.05
    from_chance_per_kind: float = 0.08
    in_terms_before: float = 0.05
    held_out_wordings: float = 0.7
    declined: float = 0.65
    between_sizes: float = 0.03
    at_temperature_1: float = 0.85
    near_finding: float = 0.8
    noticed: float = 0.9
    false_alarms: float = 0.1
    calibration_error: float = 0.05


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


def group_accuracy(robustness: Mapping[str, Any], group: str, kind: str) -> float | None:
    """Accuracy of a group of questions for one kind, or for "all" but outside questions. None if nothing was asked."""
    groups = robustness["groups"]
    names = [
        name
        for name in groups
        if name.startswith(f"{group}/")
        and (name == f"{group}/{kind}" or (kind == "all" and not name.endswith("/outside")))
    ]
    total = sum(groups[name]["num_questions"] for name in names)
    return sum(groups[name]["accuracy"] * groups[name]["num_questions"] for name in names) / total if total else None


def robustness_rows(robustness: Mapping[str, Any]) -> list[list[str]]:
    """Rows under ``ROBUSTNESS_HEAD``: wordings, sizes and temperature."""
    kinds = (*ROBUSTNESS_HEAD[1:-1], "outside")
    rows = []
    for group, name in ROBUSTNESS_ROWS.items():
        values = [group_accuracy(robustness, group, kind) for kind in kinds]
        rows.append([name, *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return rows


def robustness_shortfalls(robustness: Mapping[str, Any], thresholds: Thresholds | None = None) -> list[str]:
    """What the last stage lacks with other wordings, sizes and at temperature 1, in words."""
    limits = thresholds or Thresholds()

    def accuracy(group: str, kind: str = "all") -> float:
        value = group_accuracy(robustness, group, kind)
        assert value is not None, (group, kind)
        return value

    found = []
    trained, held_out = accuracy("trained"), accuracy("held-out")
    if held_out < limits.held_out_wordings * trained:
        least = f"{limits.held_out_wordings:.0%} of the {trained:.1%} with trained ones"
        found.append(f"accuracy with held-out wordings is {held_out:.1%}, below {least}")
    for group in ("trained", "held-out"):
        if accuracy(group, "outside") < limits.declined:
            share = f"{accuracy(group, 'outside'):.1%} of the outside questions in {ROBUSTNESS_ROWS[group]}"
            found.append(f"{share} are declined, below {limits.declined:.0%}")
    for group in ("224 px", "512 px"):
        if abs(accuracy(group) - accuracy("84 px")) > limits.between_sizes:
            found.append(
                f"accuracy at {group} is {accuracy(group):.1%}, more than {limits.between_sizes:.0%} from the "
                f"{accuracy('84 px'):.1%} at 84 px"
            )
    if accuracy("temperature 1") < limits.at_temperature_1:
        found.append(
            f"{accuracy('temperature 1'):.1%} of the answers at temperature 1 are right, below "
            f"{limits.at_temperature_1:.0%}"
        )
    return found


def certainty_lines(measured: Mapping[str, Any]) -> list[str]:
    """What was measured of maps, unfamiliar images and confidence, in words.

    Args:
        measured: the content of ``localization.json``, ``familiarity.json`` and ``confidence.json``, by name.
    """
    maps, known, sure = (measured[name] for name in ("localization", "familiarity", "confidence"))
    kinds = ", ".join(f"{name.replace('_', ' ')} {of['noticed']:.1%}" for name, of in known["unfamiliar"].items())
    return [
        f'"Where it looked" peaks on the finding or within half a patch of it in {maps["num_near"]} of '
        f"{maps['num_cases']} phantoms",
        f"Unfamiliar images noticed: {kinds}; false alarms: {known['false_alarms']:.1%}",
        f"Expected calibration error of confidence: {sure['calibration_error_after']:.3f}",
    ]


def certainty_shortfalls(measured: Mapping[str, Any], thresholds: Thresholds | None = None) -> list[str]:
    """What maps, unfamiliar images and confidence lack, in words. ``measured`` as for ``certainty_lines``."""
    limits = thresholds or Thresholds()
    near = measured["localization"]["near_finding"]["value"]
    known, error = measured["familiarity"], measured["confidence"]["calibration_error_after"]
    found = []
    if near < limits.near_finding:
        found.append(f"{near:.1%} of the maps peak near the finding, below {limits.near_finding:.0%}")
    for kind, figures in known["unfamiliar"].items():
        if figures["noticed"] < limits.noticed:
            share = f"{figures['noticed']:.1%} of the unfamiliar images ({kind.replace('_', ' ')})"
            found.append(f"{share} are noticed, below {limits.noticed:.0%}")
    if known["false_alarms"] > limits.false_alarms:
        share = f"{known['false_alarms']:.1%} of the held-out phantoms"
        found.append(f"{share} count as unfamiliar, above {limits.false_alarms:.0%}")
    if error > limits.calibration_error:
        found.append(f"the calibration error is {error:.3f}, above {limits.calibration_error}")
    return found


def to_markdown(stages: Mapping[str, Mapping[str, Any]], robustness: Mapping[str, Any] | None = None) -> str:
    """The tables in Markdown, each with a sentence that explains it."""
    metrics = next(iter(stages.values()))
    lines = markdown_table(HEAD, table_rows(stages))
    note = (
        f"Percent correct of {metrics['num_questions']:,} closed questions about {metrics['num_images']} held-out "
        "phantoms. An answer is right only if all of it is right. Chance is the accuracy of the best constant answer "
        "to each kind of question. On blank images a model can fall below chance: it may correctly see no "
        "abnormality, which is a wrong answer to a question about side or level."
    )
    parts = ["\n".join([*lines, "", note])]
    if robustness is not None:
        count = sum(group["num_questions"] for group in robustness["groups"].values())
        parts += ["\n".join(markdown_table(ROBUSTNESS_HEAD, robustness_rows(robustness)))]
        parts += [
            f"Percent correct of {count:,} questions in other wordings, at other image sizes and with sampling. A "
            "correct answer says what was asked, and all of it is true."
        ]
    return "\n\n".join(parts)


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
