"""Measurements of ``babydoctor eval RUN`` that are recorded in the run: localization, familiarity, confidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.schema import UserError

if TYPE_CHECKING:
    from babydoctor.config import TaskConfig


def measure_localization(run: Path, phantoms: Path, out: Path, max_cases: int, fill: str, device: str) -> None:
    """``--localization``. The run records the figures of the fill that the web UI uses, no others."""
    from babydoctor.eval.localization import DEFAULT_CASES, evaluate_localization
    from babydoctor.model.occlusion import FILL, FILLS
    from babydoctor.progress import named_progress

    if fill not in FILLS:
        raise UserError(f"--fill {fill}: no such fill; there are {', '.join(FILLS)}")
    num_cases = max_cases or DEFAULT_CASES
    with named_progress() as update:
        summary = evaluate_localization(
            run,
            phantoms,
            out,
            num_cases=num_cases,
            fill=fill,
            device=device,
            progress=lambda done, total: update("maps", done, total),
        )
    print(f"{summary['num_cases']} held-out phantoms; a finding covers {summary['finding_share']:.1%} of the image")
    for name, text in (
        ("on_finding", "peak on the finding"),
        ("near_finding", "peak within half a patch of it"),
        ("auc", "area under the ROC curve of pixels"),
    ):
        figure = summary[name]
        print(f"  {text}: {figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]")
    recorded = f"recorded in {run / 'manifest.json'}" if fill == FILL else f"not recorded: the web UI uses {FILL}"
    print(f"{recorded}; cases: {out / 'localization.json'}")


def measure_familiarity(
    run: Path, task: TaskConfig, out: Path, *, unfamiliar: Path | None, seed: int, device: str
) -> None:
    """``--familiarity``."""
    from babydoctor.eval.certainty.familiarity import evaluate_familiarity
    from babydoctor.model.familiarity import FILE_NAME
    from babydoctor.progress import named_progress

    options: dict[str, Any] = {"unfamiliar": unfamiliar, "seed": seed, "device": device}
    with named_progress() as update:
        summary = evaluate_familiarity(run, task, out, **options, progress=update)
    print(f"{summary['num_references']} training images, {summary['num_held_out']} held-out images")
    print(f"  false alarms on held-out images: {summary['false_alarms']:.1%}")
    for kind, figures in summary["unfamiliar"].items():
        name = kind.replace("_", " ")
        print(f"  {name}: {figures['noticed']:.1%} of {figures['num_images']} noticed, AUROC {figures['auroc']:.4f}")
    print(f"  all of them: AUROC {summary['auroc']:.4f}")
    print(f"recorded in {run / 'manifest.json'} and {run / FILE_NAME}; distances: {out / 'familiarity.json'}")


def measure_confidence(
    run: Path, task: TaskConfig, out: Path, *, seed: int, device: str, engine: dict[str, Any]
) -> None:
    """``--confidence``."""
    from babydoctor.eval.certainty.confidence import evaluate_confidence
    from babydoctor.progress import named_progress

    options: dict[str, Any] = {"seed": seed, "device": device, "engine": engine}
    with named_progress() as update:
        summary = evaluate_confidence(
            run, task, out, **options, progress=lambda done, total: update("closed questions", done, total)
        )
    print(f"temperature {summary['temperature']:.3f}, fitted on {summary['num_fitted']} answers")
    print(f"on {summary['num_measured']} other answers, of which {summary['accuracy']:.1%} are right:")
    before, after = summary["calibration_error_before"], summary["calibration_error_after"]
    print(f"  expected calibration error: {before:.4f} before, {after:.4f} after")
    print(f"recorded in {run / 'manifest.json'}; answers: {out / 'confidence.json'}")
