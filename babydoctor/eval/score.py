"""Figures of an evaluation: questions and answers in, the content of ``metrics.json`` out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from babydoctor.eval import captions, published
from babydoctor.eval.intervals import NUM_RESAMPLES, bootstrap, paired_difference
from babydoctor.eval.metrics import (
    Figure,
    abstention_curve,
    exact_match,
    expected_calibration_error,
    mean_figure,
    most_frequent,
    parse_yes_no,
    reliability_bins,
    repetition,
    token_f1,
    token_recall,
    yes_no_figures,
)
from babydoctor.eval.tasks import Question, Task

PUBLISHED_SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "llava_med_closed_accuracy": "LLaVA-Med v1.0, run_eval.py: the reference is a substring of the answer",
        "llava_med_pathvqa_closed_accuracy": "LLaVA-Med v1.0, run_eval_pvqa.py: wrong yes/no answers are not counted",
        "llava_med_open_recall": "LLaVA-Med v1.0, evaluate_metrics.py: repeated words count again",
        "vqa_med_accuracy": "ImageCLEF VQA-Med 2020/2021 evaluator",
        "vqa_med_bleu": "ImageCLEF VQA-Med evaluator, with the sentence BLEU of NLTK before 3.3",
        "imageclef_rouge1": "ImageCLEFmedical Caption: ROUGE-1 F on its preprocessing",
        "imageclef_bertscore": "ImageCLEFmedical Caption: BERTScore F, deberta-xlarge-mnli, idf",
    }
)
"""Figures by others' definitions. They are listed separately and are never a headline."""

HEADLINES = ("closed_accuracy", "yes_no_balanced_accuracy", "open_token_f1", "bleu_4", "rouge_l", "cider")
"""Figures that tables show first, if the task has them."""

CONSTANT_ANSWERS: Mapping[str, str] = MappingProxyType(
    {"always yes": "yes", "always no": "no", "yes no": "yes no", "appears normal": "The image appears normal"}
)
"""The last two score high under published definitions (see ``published.py``) and must not score high here."""

MAJORITY_PER_TYPE = "majority per question type"

_GROUP_FIGURES = ("closed_accuracy", "open_token_f1", "rouge_l")


def figures(
    questions: Sequence[Question], answers: Sequence[str], *, caption_metrics: Sequence[str] = ()
) -> list[Figure]:
    """All figures that apply to these questions, our own definitions first."""
    assert len(questions) == len(answers), (len(questions), len(answers))
    if all(question.kind == "caption" for question in questions):
        references = [question.references[0] for question in questions]
        found = captions.caption_figures(answers, references)
        return found + [captions.optional_figure(name, answers, references) for name in caption_metrics]
    pairs = list(zip(questions, answers, strict=True))
    found = [
        mean_figure(
            "closed_accuracy", [exact_match(a, q.references) if q.kind == "closed" else None for q, a in pairs]
        ),
        *yes_no_figures(answers, [question.yes_no_reference for question in questions]),
        mean_figure("open_exact_match", [exact_match(a, q.references) if q.kind == "open" else None for q, a in pairs]),
        mean_figure("open_token_f1", [token_f1(a, q.references) if q.kind == "open" else None for q, a in pairs]),
        mean_figure(
            "open_token_recall", [token_recall(a, q.references) if q.kind == "open" else None for q, a in pairs]
        ),
    ]
    return [figure for figure in found + _published_figures(pairs) if figure.columns.any()]


def _published_figures(pairs: Sequence[tuple[Question, str]]) -> list[Figure]:
    def closed(score: Any) -> list[float | None]:
        return [score(answer, q.references[0]) if q.kind == "closed" else None for q, answer in pairs]

    return [
        mean_figure("llava_med_closed_accuracy", closed(published.llava_med_closed)),
        mean_figure("llava_med_pathvqa_closed_accuracy", closed(published.llava_med_pathvqa_closed)),
        mean_figure(
            "llava_med_open_recall",
            [published.llava_med_open_recall(a, q.references[0]) if q.kind == "open" else None for q, a in pairs],
        ),
        mean_figure("vqa_med_accuracy", [published.vqa_med_accuracy(a, q.references) for q, a in pairs]),
        mean_figure("vqa_med_bleu", [published.vqa_med_bleu(a, q.references) for q, a in pairs]),
    ]


def is_right(question: Question, answer: str) -> bool:
    """True if the answer matches a reference exactly, after normalization."""
    return exact_match(answer, question.references) == 1.0


def clusters(questions: Sequence[Question]) -> list[str]:
    """The unit that the bootstrap resamples for each question: the image, or the task's own cluster."""
    return [question.cluster or question.image_key for question in questions]


def score_answers(
    task: Task,
    answers: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    caption_metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Score one set of answers: figures with intervals, in total, by group and by subset.

    Returns ``{"figures", "published", "by_group", "subsets", "repetition"}`` for JSON.
    """
    questions = task.questions
    options = {"num_resamples": num_resamples, "seed": seed}
    found = figures(questions, answers, caption_metrics=caption_metrics)
    intervals = {figure.name: bootstrap(figure, clusters(questions), **options).to_json() for figure in found}
    result: dict[str, Any] = {
        "figures": {name: value for name, value in intervals.items() if name not in PUBLISHED_SOURCES},
        "published": {
            name: {**value, "source": PUBLISHED_SOURCES[name]}
            for name, value in intervals.items()
            if name in PUBLISHED_SOURCES
        },
        "by_group": _by_group(questions, answers, options),
        "subsets": {},
        "repetition": repetition(answers),
    }
    for subset in sorted({name for question in questions for name in question.subsets}):
        inside = [index for index, question in enumerate(questions) if subset in question.subsets]
        kept, kept_answers = [questions[index] for index in inside], [answers[index] for index in inside]
        result["subsets"][subset] = {
            figure.name: bootstrap(figure, clusters(kept), **options).to_json()
            for figure in figures(kept, kept_answers)
        }
    if task.name == "phantom":
        in_terms = mean_figure(
            "closed_accuracy_in_radiology_terms",
            [exact_match(a, q.references[:1]) for q, a in zip(questions, answers, strict=True)],
        )
        result["figures"][in_terms.name] = bootstrap(in_terms, clusters(questions), **options).to_json()
    return result


def _by_group(
    questions: Sequence[Question], answers: Sequence[str], options: dict[str, int]
) -> dict[str, dict[str, dict[str, Any]]]:
    """``{group: {value: {figure: interval}}}`` for the figures that plots show."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for group in sorted({key for question in questions for key in question.groups}):
        result[group] = {}
        for value in sorted({question.groups.get(group, "unknown") for question in questions}):
            inside = [i for i, question in enumerate(questions) if question.groups.get(group, "unknown") == value]
            kept, kept_answers = [questions[i] for i in inside], [answers[i] for i in inside]
            result[group][value] = {
                figure.name: bootstrap(figure, clusters(kept), **options).to_json()
                for figure in figures(kept, kept_answers)
                if figure.name in _GROUP_FIGURES
            }
    return result


def baseline_answers(questions: Sequence[Question]) -> dict[str, list[str]]:
    """The answers of each baseline, in the order of the questions. No baseline looks at the image.

    The majorities come from the references being scored, so no other constant answer does better.
    """
    first_references = [question.references[0] for question in questions]
    answers = {} if all(question.kind == "caption" for question in questions) else dict(CONSTANT_ANSWERS)
    answers["most frequent answer"] = most_frequent(first_references)
    constant = {name: [answer] * len(questions) for name, answer in answers.items()}
    if any("question_type" in question.groups for question in questions):
        constant[MAJORITY_PER_TYPE] = majority_per_type(questions)
    return constant


def majority_per_type(questions: Sequence[Question]) -> list[str]:
    """For each question, the most frequent answer to questions of its type and kind."""
    by_type: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        by_type[_type(question)].append(question.references[0])
    majority = {key: most_frequent(answers) for key, answers in by_type.items()}
    return [majority[_type(question)] for question in questions]


def _type(question: Question) -> tuple[str, str]:
    return question.groups.get("question_type", ""), question.kind


def score_chance(questions: Sequence[Question]) -> dict[str, Any] | None:
    """Chance: the accuracy of the best constant answer to each question type, over all closed questions.

    Returns ``{"closed_accuracy", "by_question_type": {type: accuracy}}``, or None without closed questions.
    """
    closed = [question for question in questions if question.kind == "closed"]
    if not closed:
        return None
    hits: dict[str, list[float]] = defaultdict(list)
    for question, answer in zip(closed, majority_per_type(closed), strict=True):
        hits[question.groups.get("question_type", "")].append(exact_match(answer, question.references))
    return {
        "closed_accuracy": sum(map(sum, hits.values())) / len(closed),
        "by_question_type": {name: sum(values) / len(values) for name, values in hits.items() if name},
    }


def score_baselines(task: Task) -> dict[str, dict[str, float]]:
    """All figures of all constant-answer baselines, without intervals: ``{baseline: {figure: value}}``."""
    return {
        name: {figure.name: figure.value for figure in figures(task.questions, answers)}
        for name, answers in baseline_answers(task.questions).items()
    }


def score_gap(
    task: Task,
    answers: Sequence[str],
    other_answers: Sequence[str],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of ``answers`` minus those of ``other_answers`` (the same questions with other images)."""
    here, there = figures(task.questions, answers), figures(task.questions, other_answers)
    by_name = {figure.name: figure for figure in there}
    return {
        figure.name: paired_difference(
            by_name[figure.name], figure, clusters(task.questions), num_resamples=num_resamples, seed=seed
        ).to_json()
        for figure in here
        if figure.name in by_name and figure.name not in PUBLISHED_SOURCES
    }


def score_confidence(
    questions: Sequence[Question], answers: Sequence[str], confidences: Sequence[float | None]
) -> dict[str, Any] | None:
    """Calibration of yes/no answers: bins, expected calibration error, abstention curve.

    None if no answer to a yes/no question has a confidence.
    """
    kept = [
        (confidence, float(parse_yes_no(answer) == question.yes_no_reference))
        for question, answer, confidence in zip(questions, answers, confidences, strict=True)
        if confidence is not None and question.yes_no_reference
    ]
    if not kept:
        return None
    sure, right = [pair[0] for pair in kept], [pair[1] for pair in kept]
    return {
        "num_answers": len(kept),
        "expected_calibration_error": expected_calibration_error(sure, right),
        "bins": reliability_bins(sure, right),
        "abstention": abstention_curve(sure, right),
    }
