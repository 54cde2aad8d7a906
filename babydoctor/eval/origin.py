"""The identity of the evaluation in a folder, recorded in ``evaluation.json`` and repeated in ``metrics.json``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from babydoctor.config import TaskConfig
from babydoctor.eval.ask import EvalConfig, GenerationConfig
from babydoctor.eval.endpoint import Endpoint
from babydoctor.eval.leakage import fingerprint_of
from babydoctor.eval.tasks import Question, Task
from babydoctor.files import write_json, write_text
from babydoctor.schema import UserError

FORMAT = 1
MEASURED = ("localization", "familiarity", "confidence")
"""Fields of a manifest that ``babydoctor eval`` writes."""


def describe(
    task: Task,
    task_config: TaskConfig,
    config: EvalConfig,
    run: Path | None,
    predictions: Path | None,
    endpoint: Endpoint | None,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """What was evaluated: task, settings, manifest of the run, fingerprints, versions and command."""
    from babydoctor.model.run_dir import describe_software, read_manifest

    manifest = read_manifest(run).model_dump(mode="json") if run is not None else None
    return {
        "format": FORMAT,
        "task": task.name,
        "notes": list(task.notes),
        "num_questions": len(task.questions),
        "num_images": task.num_images,
        "resampled": task.resampled,
        "data_fingerprint": task.fingerprint,
        "task_config": task_config.model_dump(mode="json"),
        "eval_config": asdict(config),
        "run": None if run is None else {"path": str(run), "manifest": manifest},
        "predictions": None if predictions is None else str(predictions),
        "endpoint": None if endpoint is None else asdict(endpoint),
        "command": shlex.join(["babydoctor", *sys.argv[1:]]),
        "evaluation_id": fingerprint_of(origin)[:16],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **describe_software(),
    }


def claim(
    out: Path,
    task: Task,
    task_config: TaskConfig,
    config: EvalConfig,
    run: Path | None,
    predictions: Path | None,
    endpoint: Endpoint | None,
) -> dict[str, Any]:
    """Record in ``out`` which evaluation it holds. Refuse a folder with the answers of another one."""
    manifest = run / "manifest.json" if run is not None else None
    described = manifest.read_text(encoding="utf-8") if manifest is not None and manifest.is_file() else "null"
    origin = {
        "task": task.name,
        "data_fingerprint": task.fingerprint,
        "generation": _generation_values(config.generation),
        "seed": config.seed,
        "run": _without_figures(json.loads(described)),
        "predictions": predictions is not None,
    }
    if endpoint is not None:
        origin["endpoint"] = endpoint.model
    path = out / "evaluation.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        before["run"] = _without_figures(before.get("run"))
        changed = [key for key in origin if before.get(key) != origin[key]]
        if changed:
            raise UserError(f"--out {out}: holds another evaluation (other {', '.join(changed)}); use another folder")
    write_json(path, origin)
    lines = (json.dumps(_question_row(question), ensure_ascii=False) + "\n" for question in task.questions)
    write_text(out / "questions.jsonl", "".join(lines))
    return origin


def _without_figures(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """A manifest without the figures that were measured on the run: they do not change its answers."""
    return manifest and {key: value for key, value in manifest.items() if key not in MEASURED}


def _generation_values(generation: GenerationConfig) -> dict[str, Any]:
    """The settings that identify an evaluation. An unset template is left out: older evaluations do not record it."""
    values = asdict(generation)
    if generation.template is None:
        del values["template"]
    return values


def _question_row(question: Question) -> dict[str, Any]:
    row = {
        name: getattr(question, name)
        for name in ("id", "image_key", "prompt", "references", "kind", "groups", "subsets", "cluster")
    }
    return row | {"references": list(question.references), "subsets": list(question.subsets)}
