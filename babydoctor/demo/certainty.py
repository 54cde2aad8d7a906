"""The demo's last measurements: whether "Where it looked" points at the finding, whether the model notices unfamiliar
images, and whether its confidence is calibrated.

They take some seconds and write their figures into the run's manifest, where serving and the web UI find them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from babydoctor.config import TaskConfig
from babydoctor.eval.certainty.confidence import evaluate_confidence
from babydoctor.eval.certainty.familiarity import evaluate_familiarity
from babydoctor.eval.localization import evaluate_localization
from babydoctor.eval.origin import MEASURED
from babydoctor.progress import named_progress

LOCALIZATION = "localization.json"
NUM_REFERENCES = 1500
NUM_QUESTIONS = 600
NUM_MAPS = 40
"""A map takes about 0.4 s on one CPU core."""


def read_measured(out: Path) -> dict[str, Any]:
    """What the demo measured, by the names of ``MEASURED``."""
    return {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in MEASURED}


def measure_localization(phantoms: Path, run: Path, out: Path) -> None:
    """Write ``localization.json`` to ``out``, and its figures into the run."""
    with named_progress() as update:
        evaluate_localization(
            run, phantoms, out, num_cases=NUM_MAPS, progress=lambda done, total: update("maps", done, total)
        )


def measure_certainty(phantoms: Path, run: Path, out: Path) -> None:
    """Write ``familiarity.json`` and ``confidence.json`` to ``out``, and the figures into the run."""
    task = TaskConfig(task="phantom", data=str(phantoms))
    with named_progress() as update:
        evaluate_familiarity(run, task, out, max_references=NUM_REFERENCES, progress=update)
        evaluate_confidence(
            run,
            task.model_copy(update={"max_questions": NUM_QUESTIONS}),
            out,
            progress=lambda done, total: update("closed questions", done, total),
        )
