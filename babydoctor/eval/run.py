"""An evaluation, from questions to figures: ``evaluate_task`` in memory, ``evaluate`` with files and a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.config import TaskConfig
from babydoctor.eval.ask import (
    EvalConfig,
    Prediction,
    append_predictions,
    ask,
    build_inference,
    match_predictions,
    merge_parts,
    predictions_file,
    unanswered,
)
from babydoctor.eval.conditions import ConditionedFiles, ConditionedImages, check_conditions, condition_label
from babydoctor.eval.endpoint import Endpoint, EndpointClient, ask_endpoint
from babydoctor.eval.leakage import find_leakage, read_train_sources
from babydoctor.eval.load import load_task
from babydoctor.eval.origin import claim, describe
from babydoctor.eval.score import score_answers, score_baselines, score_chance, score_confidence, score_gap
from babydoctor.eval.tasks import Question, Task
from babydoctor.files import write_json
from babydoctor.inference import Inference
from babydoctor.model.run_dir import load_run
from babydoctor.plan.hardware import choose_device
from babydoctor.ranks import SharedWork
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest

OnAnswer = Callable[[str, int, int], None]
"""Called after each answer with the image condition's label, the number of answers so far and the total."""


def evaluate_task(
    model: BabyDoctor,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    task: Task,
    config: EvalConfig,
) -> dict[str, Any]:
    """Ask a model a task and score the answers, in memory. Training calls this at intervals.

    Returns the result of ``score_task``. The weights are used in place, without a second copy, and the model's training
    mode is restored.
    """
    options = {"pack_weights": False}
    known: dict[Hashable, Prediction] = {}
    with build_inference(model, tokenizer, manifest, task.questions, config.generation, options) as inference:
        predictions = {
            name: list(ask(inference, task.questions, _images(task, name, inference, config), config.generation, known))
            for name in _usable(task, config)
        }
    return score_task(task, predictions, config)


def score_task(task: Task, predictions: dict[str, list[Prediction]], config: EvalConfig) -> dict[str, Any]:
    """All figures of one task.

    Args:
        predictions: for each image condition, one prediction per question, in order. "right" is required.
    """
    answers = {condition: [p.answer for p in given] for condition, given in predictions.items()}
    options: dict[str, Any] = {"num_resamples": config.num_resamples, "seed": config.seed}
    right = answers["right"]
    return {
        "conditions": {
            condition: score_answers(task, given, caption_metrics=config.caption_metrics, **options)
            for condition, given in answers.items()
        },
        "gaps": {
            condition: score_gap(task, right, given, **options)
            for condition, given in answers.items()
            if condition != "right"
        },
        "baselines": score_baselines(task),
        "chance": score_chance(task.questions),
        "calibration": score_confidence(task.questions, right, [p.confidence for p in predictions["right"]]),
        "num_failed": {
            condition: sum(p.finish_reason.startswith("error") for p in given)
            for condition, given in predictions.items()
        },
    }


def evaluate(
    out: Path,
    task_config: TaskConfig,
    config: EvalConfig,
    *,
    run: Path | None = None,
    predictions: Path | None = None,
    endpoint: Endpoint | None = None,
    device: str | None = None,
    progress: OnAnswer | None = None,
    engine: Mapping[str, Any] | None = None,
    ranks: SharedWork = SharedWork(),
) -> dict[str, Any]:
    """Evaluate a run, a server or a file of predictions. Writes ``metrics.json`` and ``report.html`` to ``out``.

    Also writes ``questions.jsonl`` and, answer by answer, ``predictions-CONDITION.jsonl``, from which an interrupted
    evaluation continues. Returns the content of ``metrics.json``.

    Args:
        engine: engine settings that replace the defaults. They change speed and memory only.
        ranks: with several ranks, this is rank 0; the others call ``answer_share``.

    Raises:
        UserError: not exactly one of ``run``, ``predictions`` and ``endpoint`` is given, data are missing, or ``out``
            holds another evaluation.
    """
    from babydoctor.eval.reporting.report import write_report

    if sum(source is not None for source in (run, predictions, endpoint)) != 1:
        raise UserError("give one of a run directory, --predictions FILE and --endpoint URL")
    if ranks.size > 1 and run is None:
        raise UserError("several ranks share the questions of a run directory only; start one process")
    task = load_task(task_config)
    out.mkdir(parents=True, exist_ok=True)
    origin = claim(out, task, task_config, config, run, predictions, endpoint)
    started = time.monotonic()
    if run is not None:
        answers = _ask_run(_RunQuestions(out, task, config, run, device, engine, ranks), progress)
    elif endpoint is not None:
        answers = _ask_server(out, task, config, endpoint, progress)
    else:
        assert predictions is not None
        answers = {"right": match_predictions(predictions, task.questions)}
        file = predictions_file(out, "right")
        file.unlink(missing_ok=True)
        list(append_predictions(file, answers["right"]))
    seconds = time.monotonic() - started
    result = {
        **describe(task, task_config, config, run, predictions, endpoint, origin),
        "seconds": round(seconds, 1),
        "leakage": _leakage(task, task_config, run),
        **score_task(task, answers, config),
    }

    write_json(out / "metrics.json", _finite(result))
    write_report(out / "report.html", task, result, answers)
    return result


def answer_share(
    out: Path,
    task_config: TaskConfig,
    config: EvalConfig,
    *,
    run: Path,
    device: str | None = None,
    engine: Mapping[str, Any] | None = None,
    ranks: SharedWork,
) -> None:
    """Answer the questions of a rank other than 0. All ranks must see the same folder ``out``."""
    assert ranks.rank > 0, ranks
    ranks.wait()
    if not (out / "evaluation.json").is_file():
        raise UserError(f"--out {out}: rank 0's evaluation.json is not here; use a disk that all machines share")
    task = load_task(task_config)
    _answer(_RunQuestions(out, task, config, run, device, engine, ranks))
    ranks.wait()


@dataclass(frozen=True)
class _RunQuestions:
    """The questions of an evaluation and the run that answers them."""

    out: Path
    task: Task
    config: EvalConfig
    run: Path
    device: str | None
    engine: Mapping[str, Any] | None
    ranks: SharedWork

    @cached_property
    def conditions(self) -> tuple[str, ...]:
        return _usable(self.task, self.config)

    def merge(self) -> None:
        for condition in self.conditions:
            merge_parts(self.out, condition, self.task.questions)


def _ask_run(asked: _RunQuestions, progress: OnAnswer | None) -> dict[str, list[Prediction]]:
    """The answers of all ranks, on rank 0."""
    asked.merge()  # parts of ranks that were interrupted
    questions = asked.task.questions
    for condition in asked.conditions:
        unanswered(predictions_file(asked.out, condition), questions)  # repairs the file before others read it
    asked.ranks.wait()
    _answer(asked, progress)
    asked.ranks.wait()
    asked.merge()
    return {
        condition: match_predictions(predictions_file(asked.out, condition), questions)
        for condition in asked.conditions
    }


def _answer(asked: _RunQuestions, progress: OnAnswer | None = None) -> None:
    """Write this rank's share of the answers that are not there yet."""
    config, ranks, total = asked.config, asked.ranks, len(asked.task.questions)
    left = {
        condition: ranks.share(unanswered(predictions_file(asked.out, condition), asked.task.questions))
        for condition in asked.conditions
    }
    if not any(left.values()):
        return
    device = asked.device or choose_device("auto")
    loaded = load_run(asked.run, device=device)
    questions = [question for given in left.values() for question in given]
    parts = (loaded.model, loaded.tokenizer, loaded.manifest)
    known: dict[Hashable, Prediction] = {}
    with build_inference(*parts, questions, config.generation, asked.engine) as inference:
        for condition, given in left.items():
            images = _images(asked.task, condition, inference, config)
            predictions = ask(inference, given, images, config.generation, known)
            file = predictions_file(asked.out, condition, ranks)
            _keep(file, predictions, condition, given, total if ranks.size == 1 else len(given), progress)


def _ask_server(
    out: Path, task: Task, config: EvalConfig, endpoint: Endpoint, progress: OnAnswer | None
) -> dict[str, list[Prediction]]:
    conditions = _usable(task, config)
    files = {condition: predictions_file(out, condition) for condition in conditions}
    client = EndpointClient(endpoint)
    for condition in conditions:
        left = unanswered(files[condition], task.questions)
        images = ConditionedFiles(task.questions, condition, config.seed)
        predictions = ask_endpoint(client, left, images, config.generation)
        _keep(files[condition], predictions, condition, left, len(task.questions), progress)
    return {condition: match_predictions(files[condition], task.questions) for condition in conditions}


def _keep(
    file: Path,
    predictions: Iterable[Prediction],
    condition: str,
    left: Sequence[Question],
    total: int,
    progress: OnAnswer | None,
) -> None:
    """Write predictions as they arrive. ``total`` includes those that were written before."""
    label = condition_label(condition, sum(question.image is not None for question in left))
    for number, _ in enumerate(append_predictions(file, predictions), start=total - len(left) + 1):
        if progress is not None:
            progress(label, number, total)


def _usable(task: Task, config: EvalConfig) -> tuple[str, ...]:
    """The conditions that apply. Shuffling needs two images, blank and noise need one."""
    conditions: Sequence[str] = check_conditions(config.images_as)
    if not task.num_images:
        return ("right",)
    return tuple(name for name in conditions if name != "shuffled" or task.num_images > 1)


def _images(task: Task, condition: str, inference: Inference, config: EvalConfig) -> ConditionedImages:
    return ConditionedImages(task.questions, condition, inference.image_settings, config.seed)


def _leakage(task: Task, task_config: TaskConfig, run: Path | None) -> dict[str, Any]:
    """Leakage from the training rows that the user named, or from those in the run's configuration."""
    if task.name == "roco":
        return {"checked": bool(task_config.train), "notes": []}  # the task's notes report it, by article
    train, images = list(task_config.train), None
    if not train and run is not None:
        train, images = read_train_sources(run)
    return find_leakage(task.questions, train, images)


def _finite(value: Any) -> Any:
    """Replace NaN by None at all levels, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
