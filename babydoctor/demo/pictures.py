"""The demo's picture: held-out phantoms with the answers of the last two stages."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from babydoctor.eval.reporting.plots import new_figure
from babydoctor.imaging.isolation import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.run_dir import load_run
from babydoctor.phantom.case import Case, load_cases
from babydoctor.phantom.text import REPORT_QUESTION

LAY_QUESTION = "Please describe this picture."


def ask_about(run_path: Path, images: Sequence[Path], question: str, *, max_new_tokens: int) -> list[str]:
    """Ask a run the same question about several images."""
    run = load_run(run_path)
    turns = [user_turn(question, has_image=True)]
    queries = [
        Query(turns, to_pixels(load_image(image), run.manifest.image), max_new_tokens=max_new_tokens)
        for image in images
    ]
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, queries, batch_size=len(queries)) as inference:
        return [answer.text for answer in inference.answers(queries)]


def draw_cases(phantoms: Path, lay_run: Path, report_run: Path, out: Path, count: int = 8) -> None:
    """Draw held-out cases with a description in lay words and a report.

    Args:
        lay_run: run of the instruct stage; report_run: run of the radiology stage.
        out: PNG to write.
    """
    cases = varied_cases(load_cases(phantoms, "held_out"), count)
    images = [phantoms / "images" / case.image for case in cases]
    descriptions = ask_about(lay_run, images, LAY_QUESTION, max_new_tokens=64)
    reports = ask_about(report_run, images, REPORT_QUESTION, max_new_tokens=48)
    num_columns = (count + 1) // 2
    figure = new_figure(3.4 * num_columns, 9)
    axes = figure.subplots(2, num_columns)
    for axis, case, path, description, report in zip(axes.flat, cases, images, descriptions, reports, strict=True):
        with Image.open(path) as image:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.text(0.03, 0.97, "R", transform=axis.transAxes, color="white", va="top", fontsize=9)
        axis.text(0.97, 0.97, "L", transform=axis.transAxes, color="white", va="top", ha="right", fontsize=9)
        lines = (f"truth: {_truth(case)}", f"stage 2: {description}", f"stage 3: {report}")
        text = "\n".join(textwrap.fill(line, 46, subsequent_indent="   ") for line in lines)
        axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=8, linespacing=1.3)
    figure.suptitle("Held-out phantoms; R and L are the patient's right and left", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.18, hspace=0.62, wspace=0.08)
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(out)


def varied_cases(cases: Sequence[Case], count: int) -> list[Case]:
    """The first cases in which modality and finding vary as much as possible."""
    chosen: list[Case] = []
    modalities, findings = sorted({c.modality for c in cases}), sorted({c.finding for c in cases})
    for number in range(count):
        modality, finding = modalities[number % len(modalities)], findings[number % len(findings)]
        chosen.append(next(c for c in cases if (c.modality, c.finding) == (modality, finding) and c not in chosen))
    return chosen


def _truth(case: Case) -> str:
    location = f", {case.side} {case.level}" if case.side else ""
    return f"{case.modality}, {case.finding}{location}"
