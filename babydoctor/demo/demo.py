"""The demo: from nothing to a tiny BabyDoctor that answers questions about held-out phantoms.

A list of steps. Each leaves a result in the work directory and is skipped when it is there, so a demo that was
interrupted goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from babydoctor.phantom.text import KINDS, REPORT_QUESTION
from babydoctor.schema import UserError

STAGES = ("align", "instruct", "radiology")
NUM_TRAIN, NUM_HELD_OUT, IMAGE_SIZE, SEED = 4800, 480, 84, 7
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "tiny"

console = Console(highlight=False)


@dataclass(frozen=True)
class Step:
    """One step of the demo: what it does, the file or folder that it leaves, and how."""

    name: str
    result: Path
    run: Callable[[], None]


def build_steps(work: Path) -> list[Step]:
    """All steps up to the picture of some cases, in order."""
    from babydoctor.demo.tiny_language import make_tiny_base
    from babydoctor.phantom.write import write_phantoms

    phantoms, base = work / "phantoms", work / "base"
    steps = [
        Step(
            f"Phantoms: {NUM_TRAIN} to learn from, {NUM_HELD_OUT} held out",
            phantoms / "truth.jsonl",
            lambda: write_phantoms(
                phantoms, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=SEED, size=IMAGE_SIZE
            ),
        ),
        Step("Tiny base: CLIP tower, tokenizer, chat LLaMA", base / "llama", lambda: make_tiny_base(phantoms, base)),
    ]
    for number, stage in enumerate(STAGES, 1):
        steps += [
            Step(
                f"Stage {number}, {stage}: babydoctor train configs/tiny/{stage}.yaml",
                work / stage / "manifest.json",
                lambda stage=stage: train_stage(work, stage),  # type: ignore[misc]
            ),
            Step(
                f"Score of {stage}: questions about held-out phantoms",
                work / "scores" / f"{stage}.json",
                lambda stage=stage: score_stage(work, stage),  # type: ignore[misc]
            ),
        ]
    steps.append(Step("Picture of some cases", work / "demo_cases.png", lambda: draw_cases(work)))
    return steps


def run_demo(work: Path, *, check: bool) -> int:
    """Run the demo; returns the exit status: 1 when ``check`` is set and the score falls short."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    begun = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    for step in build_steps(work):
        if step.result.exists():
            console.print(f"[dim]done before: {step.name}[/]")
            continue
        console.print(f"[bold]{step.name}[/]")
        step_begun = time.monotonic()
        step.run()
        assert step.result.exists(), step
        console.print(f"[dim]  {time.monotonic() - step_begun:.0f} s[/]")
    lacks = print_scores(work)
    console.print(f"picture: {work / 'demo_cases.png'}")
    try_out(work, ask_once=check)
    console.print(f"total: {time.monotonic() - begun:.0f} s")
    if not check:
        return 0
    for lack in lacks:
        console.print(f"[red]falls short:[/] {lack}")
    console.print("[red]check failed[/]" if lacks else "[green]check passed[/]")
    return 1 if lacks else 0


def train_stage(work: Path, stage: str) -> None:
    """Train one stage with its tiny configuration, as ``babydoctor train`` does; resumes from its checkpoint."""
    from babydoctor.config import load_config
    from babydoctor.train.loop import train

    path = CONFIGS / f"{stage}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing: the demo needs the configurations of a checkout of the repository")
    train(load_config(path, stage_overrides(work, stage)), resume=True)


def stage_overrides(work: Path, stage: str) -> list[str]:
    """``key=value`` settings that point a tiny configuration at the work directory."""
    phantoms = work / "phantoms"
    overrides = [
        f"output_dir={work / stage}",
        f"data.rows={phantoms / f'{stage}_train.json'}",
        f"data.images={phantoms / 'images'}",
        f"data.eval_rows={phantoms / f'{stage}_held_out.json'}",
    ]
    before = STAGES.index(stage) - 1
    if before >= 0:
        return [*overrides, f"init_from={work / STAGES[before]}"]
    return [
        *overrides,
        f"model.language_model={work / 'base' / 'llama'}",
        f"model.vision_tower={work / 'base' / 'clip'}",
    ]


def score_stage(work: Path, stage: str) -> None:
    """Score a finished stage and write ``scores/STAGE.json``."""
    from babydoctor.demo.demo_score import score
    from babydoctor.files import write_json
    from babydoctor.model.run_dir import load_run

    (work / "scores").mkdir(exist_ok=True)
    write_json(work / "scores" / f"{stage}.json", score(load_run(work / stage), work / "phantoms"))


def read_scores(work: Path) -> dict[str, dict[str, Any]]:
    """The scores of all stages."""
    return {stage: json.loads((work / "scores" / f"{stage}.json").read_text(encoding="utf-8")) for stage in STAGES}


def print_scores(work: Path) -> list[str]:
    """Print the score table; returns what the last stage lacks."""
    from babydoctor.demo.demo_score import CONDITIONS, accuracies, chance, load_questions, shortfalls

    questions = load_questions(work / "phantoms")
    by_chance = chance(questions)
    scores = read_scores(work)
    table = Table(title=f"{len(questions)} closed questions about {NUM_HELD_OUT} held-out phantoms, % right")
    for column in ("after", "shown", *KINDS, "mean", "in radiology terms"):
        table.add_column(column, justify="left" if column in ("after", "shown") else "right")
    for stage in STAGES:
        for condition in CONDITIONS:
            counts = scores[stage]["scores"][condition]
            # The last stage must answer in its own terms to the letter.
            right = accuracies(counts, "exact" if stage == STAGES[-1] else "correct")
            terms = accuracies(counts, "terms")["mean"]
            table.add_row(
                stage, condition, *(f"{100 * right[key]:.1f}" for key in (*KINDS, "mean")), f"{100 * terms:.0f}"
            )
        table.add_section()
    values = [by_chance[kind] for kind in KINDS]
    table.add_row("chance", "", *(f"{100 * value:.1f}" for value in (*values, sum(values) / len(values))), "")
    console.print(table)
    example = next(q for q in questions if q.kind == "finding" and q.truth == "fracture")
    # What a model says may hold anything, "[/INST]" too, which rich would take for markup.
    console.print(f"One question, {example.question.split(chr(10))[-1]!r} (truth: {example.truth}):", markup=False)
    for stage in STAGES:
        console.print(f"  after {stage:<10} {scores[stage]['answers'][example.id]!r}", markup=False)
    return shortfalls(scores["radiology"], scores["instruct"], by_chance)


def draw_cases(work: Path, count: int = 8) -> None:
    """Draw held-out cases with what stages 2 and 3 say about them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from babydoctor.data.rows import image_first
    from babydoctor.demo.demo_score import Answerer
    from babydoctor.model.run_dir import load_run
    from babydoctor.phantom.write import Case, load_cases

    phantoms = work / "phantoms"
    cases = _varied(load_cases(phantoms, "held_out"), count)
    lay = Answerer(load_run(work / "instruct"), phantoms / "images").ask(
        [("<image>\nPlease describe this picture.", case.image) for case in cases], max_new_tokens=64
    )
    terse = Answerer(load_run(work / "radiology"), phantoms / "images").ask(
        [(image_first(REPORT_QUESTION), case.image) for case in cases], max_new_tokens=48
    )

    def truth(case: Case) -> str:
        place = f", {case.side} {case.level}, {case.size_mm:.0f} mm" if case.side else ""
        return f"{case.modality}, {case.finding}{place}"

    figure, axes = plt.subplots(2, (count + 1) // 2, figsize=(3.4 * ((count + 1) // 2), 9), facecolor="white")
    for axis, case, everyday, report in zip(axes.flat, cases, lay, terse, strict=True):
        with Image.open(phantoms / "images" / case.image) as image:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        axis.set_xticks([]), axis.set_yticks([])
        axis.text(0.03, 0.97, "R", transform=axis.transAxes, color="white", va="top", fontsize=9)
        axis.text(0.97, 0.97, "L", transform=axis.transAxes, color="white", va="top", ha="right", fontsize=9)
        said = "\n".join(
            _wrapped(f"{who}: {what}")
            for who, what in (("truth", truth(case)), ("stage 2", everyday), ("stage 3", report))
        )
        axis.text(0, -0.03, said, transform=axis.transAxes, va="top", fontsize=8, linespacing=1.3)
    figure.suptitle("Held-out phantoms; R and L are the patient's right and left", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.94, bottom=0.18, hspace=0.62, wspace=0.08)
    temporary = work / ".demo_cases.png"
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    temporary.replace(work / "demo_cases.png")


def _varied(cases: Sequence[Any], count: int) -> list[Any]:
    """The first cases in which modalities and findings vary as much as they can."""
    chosen: list[Any] = []
    modalities, findings = sorted({c.modality for c in cases}), sorted({c.finding for c in cases})
    for number in range(count):
        modality, finding = modalities[number % len(modalities)], findings[number % len(findings)]
        chosen.append(next(c for c in cases if (c.modality, c.finding) == (modality, finding) and c not in chosen))
    return chosen


def _wrapped(text: str, width: int = 46) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, subsequent_indent="   "))


def try_out(work: Path, *, ask_once: bool) -> None:
    """One question on the terminal about a held-out phantom; with ``ask_once`` also one on each wire."""
    from babydoctor.cli.chat_session import answer
    from babydoctor.phantom.write import load_cases

    case = next(case for case in load_cases(work / "phantoms", "held_out") if case.finding == "fracture")
    image = work / "phantoms" / "images" / case.image
    question = REPORT_QUESTION.split("\n")[0]
    run = os.path.relpath(work / "radiology")
    command = f'babydoctor chat {run} --image {os.path.relpath(image)} "{question}"'
    console.print(f"\n[bold]{escape(command)}[/]")
    answer(work / "radiology", image, question)
    console.print(f"[dim]truth: {case.modality}, {case.finding}, {case.side} {case.level}, {case.size_mm} mm[/]")
    if ask_once:
        ask_on_each_wire(work / "radiology", image.read_bytes())


def ask_on_each_wire(run: Path, image: bytes, question: str = "What is the main finding?") -> None:
    """Start controller, worker and page on free ports, ask once over each wire, stop them."""
    from babydoctor.serve.client import Client
    from babydoctor.serve.launch import launched

    ports = ["controller.port=0", "worker.port=0", "page.port=0"]
    with launched(run, overrides=ports) as served, Client(served.controller_url) as client:
        (model,) = client.models()
        console.print(f"\n[bold]{question}[/] asked over HTTP at {served.controller_url}; page at {served.page_url}")
        console.print(f"  LLaVA's wire:  {client.ask_llava(model, question, image)}", markup=False)
        console.print(f"  OpenAI's wire: {client.ask_openai(model, question, image)}", markup=False)
