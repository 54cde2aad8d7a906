"""Comparison of two evaluations of the same questions: ``babydoctor eval compare A B``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from babydoctor.eval.ask import match_predictions, predictions_file
from babydoctor.eval.intervals import NUM_RESAMPLES, paired_difference
from babydoctor.eval.score import PUBLISHED_SOURCES, clusters, figures
from babydoctor.eval.tasks import Question, read_json
from babydoctor.files import split_lines
from babydoctor.schema import UserError


def load_questions(folder: Path) -> list[Question]:
    """The questions of a finished evaluation, without images."""
    path = folder / "questions.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder that `babydoctor eval ... --out` wrote")
    rows = (json.loads(line) for line in split_lines(path.read_text(encoding="utf-8")))
    return [
        Question(
            id=row["id"],
            image=None,
            image_key=row["image_key"],
            prompt=row["prompt"],
            references=tuple(row["references"]),
            kind=row["kind"],
            groups=row["groups"],
            subsets=tuple(row["subsets"]),
            cluster=row["cluster"],
        )
        for row in rows
    ]


def compare(a: Path, b: Path, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Compare two evaluation folders figure by figure.

    Returns ``{"a", "b", "num_questions", "num_same_answers", "figures": {name: FIGURE}}`` with ``FIGURE = {"a", "b",
    "value", "low", "high", "p_value"}``. ``value`` is B minus A. Answers are the same if their text is equal.

    Raises:
        UserError: the evaluations have different questions.
    """
    fingerprints = [read_json(folder / "metrics.json")["data_fingerprint"] for folder in (a, b)]
    if fingerprints[0] != fingerprints[1]:
        raise UserError(
            f"{a} and {b} have different questions (data fingerprints {fingerprints[0][:12]} and "
            f"{fingerprints[1][:12]}); evaluate both on the same data with the same prompt"
        )
    questions = load_questions(a)
    answers = [
        [prediction.answer for prediction in match_predictions(predictions_file(folder, "right"), questions)]
        for folder in (a, b)
    ]
    found_a, found_b = figures(questions, answers[0]), figures(questions, answers[1])
    by_name = {figure.name: figure for figure in found_b}
    result = {}
    for figure in found_a:
        if figure.name in PUBLISHED_SOURCES or figure.name not in by_name:
            continue
        other = by_name[figure.name]
        difference = paired_difference(figure, other, clusters(questions), num_resamples=num_resamples, seed=seed)
        result[figure.name] = {"a": figure.value, "b": other.value, **difference.to_json()}
    num_same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    counts = {"num_questions": len(questions), "num_same_answers": num_same}
    return {"a": str(a), "b": str(b), **counts, "figures": result}
