"""One evaluation from questions to figures: `evaluate_task` in memory, `evaluate` with files and a report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.eval.ask import (
    Asker,
    GenerationConfig,
    Prediction,
    append_predictions,
    match_predictions,
    unanswered,
)
from babydoctor.eval.conditions import ConditionedImages, check_conditions
from babydoctor.eval.intervals import NUM_RESAMPLES
from babydoctor.eval.leakage import find_leakage, fingerprint_of, read_train_sources
from babydoctor.eval.score import score_answers, score_baselines, score_confidence, score_gap
from babydoctor.eval.tasks import Question, Task, TaskConfig, load_task
from babydoctor.files import write_json, write_text
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest, Run

FORMAT = 1
OnAnswer = Callable[[str, int, int], None]
"""Called after each answer with the condition, the answers so far and their number at the end."""


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """How a task is asked and scored. ``images_as`` names the conditions of ``conditions.py``."""

    images_as: tuple[str, ...] = ("right", "shuffled", "blank", "noise")
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0
    caption_metrics: tuple[str, ...] = ()


def evaluate_task(
    model: BabyDoctor,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    task: Task,
    config: EvalConfig,
) -> dict[str, Any]:
    """Ask a model a task and score it, in memory: for training to call at intervals.

    Returns what `score_task` does. The model is used as it is, in evaluation mode, which is put back afterwards;
    no second copy of its weights is made, and the KV cache is sized for the task's longest question.
    """
    was_training = model.training
    model.eval()
    try:
        with Asker(model, tokenizer, manifest, task.questions, config.generation, {"pack_weights": False}) as asker:
            predictions = {
                condition: list(asker.ask(task.questions, _images(task, condition, asker, config)))
                for condition in _usable(task, config)
            }
    finally:
        model.train(was_training)
    return score_task(task, predictions, config)


def score_task(task: Task, predictions: dict[str, list[Prediction]], config: EvalConfig) -> dict[str, Any]:
    """All figures of one task.

    ``predictions`` holds, for each condition, one answer to each question in their order; "right" must be there.
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
    device: str | None = None,
    progress: OnAnswer | None = None,
    engine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ask a run, or take a file of predictions, and write ``metrics.json`` and ``report.html`` to ``out``.

    Also written: ``questions.jsonl`` and ``predictions-CONDITION.jsonl`` (as they come, so that an interrupted
    evaluation continues). Returns what ``metrics.json`` holds.

    Args:
        engine: settings of the engine that replace the defaults; they change speed and memory, not what is asked.

    Raises:
        UserError: neither or both of ``run`` and ``predictions`` are given, data are missing, or ``out`` holds
            another evaluation.
    """
    from babydoctor.eval.report import write_report

    if (run is None) == (predictions is None):
        raise UserError("give either a run directory or --predictions FILE, and not both")
    task = load_task(task_config)
    out.mkdir(parents=True, exist_ok=True)
    origin = _claim(out, task, task_config, config, run, predictions)
    started = time.monotonic()
    if run is not None:
        answers = _ask_run(out, task, config, run, device, progress, engine)
    else:
        assert predictions is not None
        answers = {"right": match_predictions(predictions, task.questions)}
        (out / "predictions-right.jsonl").unlink(missing_ok=True)
        list(append_predictions(out / "predictions-right.jsonl", answers["right"]))
    seconds = time.monotonic() - started
    result = {
        **describe(task, task_config, config, run, predictions, origin),
        "seconds": round(seconds, 1),
        "leakage": _leakage(task, task_config, run),
        **score_task(task, answers, config),
    }

    write_json(out / "metrics.json", _finite(result))
    write_report(out / "report.html", task, result, answers)
    return result


def describe(
    task: Task,
    task_config: TaskConfig,
    config: EvalConfig,
    run: Path | None,
    predictions: Path | None,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """What was evaluated: task, settings, lineage of the run, fingerprints, versions, command."""
    from babydoctor.model.run_dir import describe_software, read_manifest

    manifest = read_manifest(run).model_dump(mode="json") if run is not None else None
    return {
        "format": FORMAT,
        "task": task.name,
        "notes": list(task.notes),
        "num_questions": len(task.questions),
        "num_images": len({question.image_key for question in task.questions}),
        "data_fingerprint": task.fingerprint,
        "task_config": asdict(task_config),
        "eval_config": asdict(config),
        "run": None if run is None else {"path": str(run), "manifest": manifest},
        "predictions": None if predictions is None else str(predictions),
        "command": shlex.join(["babydoctor", *sys.argv[1:]]),
        "evaluation_id": fingerprint_of(origin)[:16],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **describe_software(),
    }


def _claim(
    out: Path,
    task: Task,
    task_config: TaskConfig,
    config: EvalConfig,
    run: Path | None,
    predictions: Path | None,
) -> dict[str, Any]:
    """Mark ``out`` as this evaluation's; refuse where it holds answers of another one."""

    manifest = run / "manifest.json" if run is not None else None
    origin = {
        "task": task.name,
        "data_fingerprint": task.fingerprint,
        "generation": asdict(config.generation),
        "seed": config.seed,
        "run": json.loads(manifest.read_text()) if manifest is not None and manifest.is_file() else None,
        "predictions": predictions is not None,
    }
    path = out / "evaluation.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in origin if before.get(key) != origin[key]]
        if changed:
            raise UserError(
                f"--out {out}: holds another evaluation (other {', '.join(changed)}); give another folder or delete it"
            )
    write_json(path, origin)
    lines = (json.dumps(_question_row(question), ensure_ascii=False) + "\n" for question in task.questions)
    write_text(out / "questions.jsonl", "".join(lines))
    return origin


def _question_row(question: Question) -> dict[str, Any]:
    row = {
        name: getattr(question, name)
        for name in ("id", "image_key", "prompt", "references", "kind", "groups", "subsets", "cluster")
    }
    return row | {"references": list(question.references), "subsets": list(question.subsets)}


def _ask_run(
    out: Path,
    task: Task,
    config: EvalConfig,
    run: Path,
    device: str | None,
    progress: OnAnswer | None,
    engine: Mapping[str, Any] | None,
) -> dict[str, list[Prediction]]:
    conditions = _usable(task, config)
    files = {condition: out / f"predictions-{condition}.jsonl" for condition in conditions}
    left = {condition: unanswered(files[condition], task.questions) for condition in conditions}
    if any(left.values()):
        loaded = _load(run, device)
        questions = [question for condition in conditions for question in left[condition]]
        with Asker(loaded.model, loaded.tokenizer, loaded.manifest, questions, config.generation, engine) as asker:
            for condition in conditions:
                images = _images(task, condition, asker, config)
                answered = append_predictions(files[condition], asker.ask(left[condition], images))
                for number, _ in enumerate(answered, start=len(task.questions) - len(left[condition]) + 1):
                    if progress is not None:
                        progress(condition, number, len(task.questions))
    return {condition: match_predictions(files[condition], task.questions) for condition in conditions}


def _load(run: Path, device: str | None) -> Run:
    import torch

    from babydoctor.model.run_dir import load_run

    return load_run(run, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _usable(task: Task, config: EvalConfig) -> tuple[str, ...]:
    """The conditions that make sense: without two images there is nothing to shuffle, without any nothing to blank."""
    conditions: Sequence[str] = check_conditions(config.images_as)
    images = {question.image_key for question in task.questions if question.image is not None}
    if not images:
        return ("right",)
    return tuple(name for name in conditions if name != "shuffled" or len(images) > 1)


def _images(task: Task, condition: str, asker: Asker, config: EvalConfig) -> ConditionedImages:
    return ConditionedImages(task.questions, condition, asker.image_settings, config.seed)


def _leakage(task: Task, task_config: TaskConfig, run: Path | None) -> dict[str, Any]:
    """Leakage against the rows that were named, or else those of the run's own configuration."""
    if task.name == "roco":
        return {"checked": bool(task_config.train), "notes": []}  # the task's notes tell it, by article
    train, images = list(task_config.train), None
    if not train and run is not None:
        train, images = read_train_sources(run)
    return find_leakage(task.questions, train, images)


def _finite(value: Any) -> Any:
    """NaN becomes None all the way down: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
