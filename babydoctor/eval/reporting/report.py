"""``report.html``: one self-contained file with tables, plots, and cases with their images."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from babydoctor.eval.ask import Prediction
from babydoctor.eval.reporting import plots
from babydoctor.eval.score import HEADLINES, is_right
from babydoctor.eval.tasks import Question, Task
from babydoctor.imaging.isolation import load_image

NUM_CASES = 12
"""Cases on each side of the gallery."""
THUMBNAIL_EDGE = 224
MAX_BYTES = 10_000_000

_GROUP_FIGURES = ("closed_accuracy", "open_token_f1", "rouge_l")


def write_report(
    path: Path, task: Task, result: Mapping[str, Any], predictions: Mapping[str, Sequence[Prediction]]
) -> None:
    """Write the report of one evaluation.

    Args:
        path: the HTML file.
        task: the task with its questions.
        result: what ``metrics.json`` holds.
        predictions: the answers, by image condition.
    """
    run = result["run"]
    right = result["conditions"]["right"]
    headlines = headline_figures(result)
    stages = run["manifest"]["lineage"] if run else []
    css = (files("babydoctor.eval.reporting") / "templates" / "report.css").read_text(encoding="utf-8")
    page = (
        _environment()
        .get_template("report.html")
        .render(
            css=Markup(css),
            task=task,
            result=result,
            right=right,
            run=run,
            headlines=headlines,
            asked=count_asked(result),
            subject=run["manifest"]["name"] if run else Path(str(result["predictions"])).name,
            notes=_notes(result),
            conditions_plot=_conditions_plot(result, headlines),
            group_plots=_group_plots(right),
            calibration_plots=_calibration_plots(result["calibration"]),
            repeats=right["repetition"],
            most_repeated=[
                (entry["answer"][:120] or "(empty)", entry["count"], f"{entry['share']:.1%}")
                for entry in right["repetition"]["most_repeated"]
            ],
            gallery=_gallery(task, predictions["right"]),
            lineage=" → ".join(
                f"{stage['name']} ({stage['steps']} steps, {stage['samples']} samples)" for stage in stages
            ),
            versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        )
    )
    size = len(page.encode())
    assert size < MAX_BYTES, f"the report has {size} bytes; the gallery must be smaller"
    path.write_text(page, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("babydoctor.eval.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": lambda value: "–" if value is None else f"{value:.3f}",
        "percent": lambda value: f"{value:.1%}",
        "words": lambda name: name.replace("_", " "),
    }
    return environment


def headline_figures(result: Mapping[str, Any]) -> list[str]:
    """The headline figures that this task has."""
    found = result["conditions"]["right"]["figures"]
    return [name for name in HEADLINES if found.get(name, {}).get("value") is not None]


def count_asked(result: Mapping[str, Any]) -> str:
    """What was asked, in words: "3 questions about 1 image"."""
    questions, images = result["num_questions"], result["num_images"]
    about = f"about {images} image{'s' if images > 1 else ''}" if images else "without images"
    return f"{questions} question{'s' if questions != 1 else ''} {about}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [*result["notes"], *result["leakage"]["notes"]]
    if failed := sum(result["num_failed"].values()):
        notes.append(f"{failed} questions could not be answered and count as empty answers.")
    return notes


def _conditions_plot(result: Mapping[str, Any], headlines: Sequence[str]) -> Markup:
    if not result["gaps"]:
        return Markup("")
    plot = plots.plot_conditions(result["conditions"], headlines)
    return Markup(plots.to_image_tag(plot, "figures by image condition"))


def _group_plots(right: Mapping[str, Any]) -> list[Markup]:
    images = []
    for group, values in right["by_group"].items():
        for figure in _GROUP_FIGURES:
            if any(value.get(figure, {}).get("value") is not None for value in values.values()):
                overall = right["figures"].get(figure, {}).get("value")
                title = f"{figure.replace('_', ' ')} by {group.replace('_', ' ')}"
                plot = plots.plot_groups(values, figure, title, overall)
                images.append(Markup(plots.to_image_tag(plot, title)))
    return images


def _calibration_plots(calibration: Mapping[str, Any] | None) -> list[Markup]:
    if calibration is None:
        return []
    return [
        Markup(plots.to_image_tag(plots.plot_calibration(calibration), "calibration")),
        Markup(plots.to_image_tag(plots.plot_abstention(calibration), "abstention")),
    ]


def _gallery(task: Task, predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Cases by a fixed random draw, so that nothing is hand-picked."""
    pairs = list(zip(task.questions, predictions, strict=True))
    random.Random(0).shuffle(pairs)
    if task.is_caption:
        cases = [_case(*pair) for pair in pairs[: 2 * NUM_CASES]]
        return [{"title": "Captions, drawn at random", "css_class": "caption", "cases": cases}]
    sides = []
    for css_class, wanted, title in (("right", True, "Right answers"), ("wrong", False, "Wrong answers")):
        chosen = [pair for pair in pairs if is_right(pair[0], pair[1].answer) == wanted]
        sides.append(
            {
                "title": f"{title}, drawn at random ({len(chosen)})",
                "css_class": css_class,
                "cases": [_case(*pair) for pair in chosen[:NUM_CASES]],
            }
        )
    return sides


def _case(question: Question, prediction: Prediction) -> dict[str, Any]:
    return {
        "image": _thumbnail(question),
        "image_key": question.image_key,
        "question": question.prompt,
        "reference": " / ".join(question.references[:3]),
        "answer": prediction.answer,
        "confidence": prediction.confidence,
    }


def _thumbnail(question: Question) -> str:
    """The image as a JPEG data URL; empty without an image."""
    if question.image is None:
        return ""
    image = load_image(question.image)
    image.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
