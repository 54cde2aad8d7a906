"""``babydoctor eval RUN --confidence``: calibrate the confidence of answers to closed questions.

One half of the images sets the temperature, and the other half measures the calibration error before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from babydoctor.config import TaskConfig
from babydoctor.eval.certainty.calibration import (
    NUM_TOP,
    TEMPERATURES,
    answer_log_probability,
    equal_count_bins,
    fit_temperature,
    split_by_group,
)
from babydoctor.eval.conditions import ConditionedImages
from babydoctor.eval.load import load_task
from babydoctor.eval.metrics import exact_match, expected_calibration_error, parse_yes_no
from babydoctor.eval.tasks import Question
from babydoctor.files import write_json
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.run_dir import Run, load_run, read_manifest, write_manifest
from babydoctor.schema import UserError

MAX_NEW_TOKENS = 48
BATCH_SIZE = 64

FEWEST_QUESTIONS = 100
"""Fewest closed questions. With fewer, a bin has less than five answers."""

FEWEST_IMAGES = 10
"""Fewest images. They are split into halves."""


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer to a closed question."""

    id: str
    image_key: str
    answer: str
    log_probabilities: np.ndarray
    """Log-probability of the answer at each of ``TEMPERATURES``, ``[G]``."""
    num_tokens: int
    is_right: bool


def evaluate_confidence(
    run_directory: Path,
    task_config: TaskConfig,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    engine: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Calibrate a run on the closed questions of a task, write ``confidence.json`` and record the figures.

    Raises:
        UserError: the task has too few closed questions, or the model ended too few answers.
    """
    questions = [question for question in load_task(task_config).questions if question.kind == "closed"]
    _check_count(len(questions), "the task has")
    run = load_run(run_directory, device=device)
    answers = []
    for number, answer in enumerate(_ask(run, questions, engine), start=1):
        if answer is not None:
            answers.append(answer)
        if progress is not None:
            progress(number, len(questions))
    _check_count(len(answers), f"the model ended its answer within {MAX_NEW_TOKENS} tokens to")
    num_images = len({answer.image_key for answer in answers})
    if num_images < FEWEST_IMAGES:
        raise UserError(f"the questions are about {num_images} images; --confidence needs at least {FEWEST_IMAGES}")
    summary = {"task": task_config.task, "num_questions": len(questions), **_summarize(answers, seed)}
    write_manifest(run_directory, read_manifest(run_directory).model_copy(update={"confidence": summary}))
    out.mkdir(parents=True, exist_ok=True)
    best = int(np.abs(TEMPERATURES - summary["temperature"]).argmin())
    rows = [
        {
            "id": answer.id,
            "answer": answer.answer,
            "confidence": float(np.exp(answer.log_probabilities[best])),
            "is_right": answer.is_right,
        }
        for answer in answers
    ]
    write_json(out / "confidence.json", {**summary, "answers": rows})
    return summary


def _check_count(count: int, subject: str) -> None:
    if count < FEWEST_QUESTIONS:
        raise UserError(f"{subject} {count} closed questions; --confidence needs at least {FEWEST_QUESTIONS}")


def _ask(run: Run, questions: list[Question], engine: Mapping[str, Any] | None) -> Iterator[ScoredAnswer | None]:
    """Greedy answers in order; None for one that the model did not end."""
    bare = [
        Query(
            [user_turn(question.prompt, has_image=question.image is not None)],
            max_new_tokens=MAX_NEW_TOKENS,
            logprobs=NUM_TOP,
            id=question.id,
        )
        for question in questions
    ]
    parts = (run.model, run.tokenizer, run.manifest)
    with Inference.for_queries(*parts, bare, batch_size=BATCH_SIZE, engine=engine) as inference:
        images = ConditionedImages(questions, "right", inference.image_settings)
        queries = (
            replace(query, pixels=images.pixels(question)) for question, query in zip(questions, bare, strict=True)
        )
        for question, answer in zip(questions, inference.answers(queries), strict=True):
            if answer.finish_reason != "stop":
                yield None
                continue
            scores = answer_log_probability(answer.logprobs, inference.engine.vocab_size, TEMPERATURES)
            right = _is_right(question, answer.text)
            yield ScoredAnswer(question.id, question.image_key, answer.text, scores, answer.num_tokens, right)


def _is_right(question: Question, answer: str) -> bool:
    """The answer as closed questions compare it: parsed for yes/no questions, else the normalized text."""
    if question.yes_no_reference:
        return parse_yes_no(answer) == question.yes_no_reference
    return exact_match(answer, question.references) == 1.0


def _summarize(answers: list[ScoredAnswer], seed: int) -> dict[str, Any]:
    log_p = np.stack([answer.log_probabilities for answer in answers])  # [N, G]
    right = np.array([float(answer.is_right) for answer in answers])
    fits = split_by_group([answer.image_key for answer in answers], seed)
    best, plain = fit_temperature(log_p[fits], right[fits]), int(np.abs(np.log(TEMPERATURES)).argmin())
    before, after = np.exp(log_p[~fits, plain]), np.exp(log_p[~fits, best])
    measured = right[~fits].tolist()
    return {
        "temperature": float(TEMPERATURES[best]),
        "max_tokens": max(answer.num_tokens for answer in answers),
        "num_fitted": int(fits.sum()),
        "num_measured": int((~fits).sum()),
        "accuracy": float(right[~fits].mean()),
        "calibration_error_before": expected_calibration_error(before.tolist(), measured),
        "calibration_error_after": expected_calibration_error(after.tolist(), measured),
        "bins": equal_count_bins(after, right[~fits]),
    }
