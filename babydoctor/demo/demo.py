"""The demo: trains a tiny BabyDoctor from scratch and scores it on held-out phantoms.

The demo is a list of steps. Each step writes a result to the work directory and is skipped if the result exists, so an
interrupted demo continues where it stopped. The three stages use all cores. The other steps run two at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from babydoctor.demo.steps import Step, run_steps
from babydoctor.demo.table import (
    CONDITIONS,
    HEAD,
    ROBUSTNESS_HEAD,
    SECTION,
    certainty_lines,
    certainty_shortfalls,
    robustness_rows,
    robustness_shortfalls,
    shortfalls,
    table_rows,
    to_markdown,
)
from babydoctor.markers import write_section
from babydoctor.phantom.case import DEMO_SEED, build_cases
from babydoctor.phantom.text import QUESTIONS, REPORT_QUESTION
from babydoctor.schema import UserError

STAGES = ("align", "instruct", "radiology")
NUM_TRAIN, NUM_HELD_OUT, IMAGE_SIZE = 4800, 480, 84
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "tiny"

TEMPLATE = "llava_llama_2"
"""Every stage is asked in the chat template, also the first, which trains on plain captions."""

MAX_NEW_TOKENS = 24
"""The longest lay answer has 13 tokens."""

BATCH_SIZE = 64

# A log file gets the tables in full width; 80 columns would cut off the heads.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def build_steps(work: Path, *, check: bool = False) -> list[Step]:
    """All steps, in order. Of those after the last stage, the longest come first.

    Args:
        check: also ask the web UI's examples over HTTP. They are asked again each time.
    """
    from babydoctor.demo.certainty import LOCALIZATION, measure_certainty, measure_localization
    from babydoctor.demo.pictures import draw_cases
    from babydoctor.phantom.write import write_phantoms

    phantoms, base, scores, run = work / "phantoms", work / "base", work / "scores", work / STAGES[-1]
    drawn, certainty, picture = phantoms / "truth.jsonl", scores / "certainty", work / "demo_cases.png"
    maps = certainty / LOCALIZATION
    step = partial(Step, shares_cores=True)
    draw_phantoms = partial(
        write_phantoms, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=DEMO_SEED, size=IMAGE_SIZE
    )
    steps = [
        step(f"Phantoms: {NUM_TRAIN} for training, {NUM_HELD_OUT} held out", drawn, partial(draw_phantoms, phantoms)),
        step("Vision tower: a small CLIP", base / "clip", partial(make_base_tower, phantoms, base), needs=drawn),
        step("Language model: tokenizer and a small LLaMA", base / "llama", partial(make_base_llama, base)),
    ]
    for number, stage in enumerate(STAGES, 1):
        name = f"Stage {number}, {stage}: babydoctor train configs/tiny/{stage}.yaml"
        steps.append(Step(name, work / stage / "manifest.json", partial(train_stage, work, stage)))
    if check:
        from babydoctor.demo import first_contact

        asked = scores / first_contact.FILE_NAME
        asked.unlink(missing_ok=True)
        name = "First contact: the web UI's examples and ready-made questions, over HTTP"
        steps.append(step(name, asked, partial(first_contact.measure, run, asked)))
    steps += [
        step(
            "Robustness: other wordings, image sizes, temperature 1",
            scores / "robustness.json",
            partial(score_robustness, work),
        ),
        step("Maps: where it looked at findings", maps, partial(measure_localization, phantoms, run, certainty)),
        # It needs the maps only because both write into the manifest of the run.
        step(
            "Confidence: calibration, and images unlike the phantoms",
            certainty / "confidence.json",
            partial(measure_certainty, phantoms, run, certainty),
            needs=maps,
        ),
    ]
    for stage in STAGES:
        name = f"Score of {stage}: questions about held-out phantoms"
        steps.append(step(name, work / "scores" / stage / "metrics.json", partial(score_stage, work, stage)))
    draw = partial(draw_cases, phantoms, work / "instruct", run, picture)
    return [*steps, step("Picture: some cases", picture, draw)]


def run_demo(work: Path, *, check: bool, update: Path | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the demo. Returns the exit status: 1 if ``check`` is set and the score is too low, else 0.

    Args:
        update: Markdown file to write the score table to, between its markers.
        prepare: called in each process that the demo starts for steps.
    """
    started = time.monotonic()
    (work / "scores").mkdir(parents=True, exist_ok=True)
    run_steps(build_steps(work, check=check), console, prepare)
    missing = print_scores(work, update)
    console.print(f"picture: {work / 'demo_cases.png'}")
    missing += try_out(work, ask_all=check)
    console.print(f"total: {time.monotonic() - started:.0f} s")
    if not check:
        return 0
    for text in missing:
        console.print(f"[red]failed:[/] {escape(text)}")
    console.print("[red]check failed[/]" if missing else "[green]check passed[/]")
    return 1 if missing else 0


def make_base_tower(phantoms: Path, base: Path) -> None:
    """Train the vision tower on the training phantoms."""
    from babydoctor.demo.tiny_tower import make_tower
    from babydoctor.phantom.case import load_cases

    make_tower(load_cases(phantoms, "train"), phantoms / "images", base / "clip")


def make_base_llama(base: Path) -> None:
    """Train the language model. It reads texts about the training phantoms and need not wait for their images."""
    from babydoctor.demo.tiny_language import make_language_model

    make_language_model(build_cases("train", NUM_TRAIN, DEMO_SEED), base / "llama")


def train_stage(work: Path, stage: str) -> None:
    """Train one stage with its tiny configuration, or resume it, exactly as ``babydoctor train`` does."""
    from babydoctor.config import load_config
    from babydoctor.train.loop import train

    path = CONFIGS / f"{stage}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; run the demo in a checkout of the repository")
    train(load_config(path, stage_overrides(work, stage)), resume=True)


def stage_overrides(work: Path, stage: str) -> list[str]:
    """``key=value`` settings for the paths of a tiny configuration."""
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
    """Evaluate a finished stage on the phantom task and write ``scores/STAGE/metrics.json``."""
    from babydoctor.config import TaskConfig
    from babydoctor.eval.ask import GenerationConfig
    from babydoctor.eval.run import EvalConfig, evaluate
    from babydoctor.progress import named_progress

    generation = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH_SIZE, template=TEMPLATE)
    config = EvalConfig(images_as=CONDITIONS, generation=generation)
    task = TaskConfig(task="phantom", data=str(work / "phantoms"))
    with named_progress() as update:
        # Scores of two stages may be measured at the same time.
        evaluate(
            work / "scores" / stage,
            task,
            config,
            run=work / stage,
            progress=lambda images, done, total: update(f"{stage}, {images}", done, total),
        )


def score_robustness(work: Path) -> None:
    """Ask the last stage in other ways and write ``scores/robustness.json``."""
    from babydoctor.demo.robustness import measure
    from babydoctor.progress import named_progress

    with named_progress() as update:
        measure(
            work / "phantoms",
            work / STAGES[-1],
            work / "scores" / "robustness.json",
            lambda done, total: update("other ways to ask", done, total),
        )


def read_robustness(work: Path) -> dict[str, Any]:
    """``robustness.json`` of the last stage."""
    return dict(json.loads((work / "scores" / "robustness.json").read_text(encoding="utf-8")))


def read_scores(work: Path) -> dict[str, dict[str, Any]]:
    """``metrics.json`` of each stage."""
    paths = {stage: work / "scores" / stage / "metrics.json" for stage in STAGES}
    return {stage: json.loads(path.read_text(encoding="utf-8")) for stage, path in paths.items()}


def print_scores(work: Path, update: Path | None = None) -> list[str]:
    """Print the score tables and an example. Returns what the last stage lacks.

    Args:
        update: Markdown file to write the tables to, between its markers.
    """
    from babydoctor.demo.certainty import read_measured

    stages, robustness = read_scores(work), read_robustness(work)
    measured = read_measured(work / "scores" / "certainty")
    title = f"{stages[STAGES[0]]['num_questions']} closed questions about held-out phantoms, % correct"
    _print_table(title, HEAD, table_rows(stages), num_names=2, section=len(CONDITIONS))
    _print_table("Other wordings, sizes and sampling, % correct", ROBUSTNESS_HEAD, robustness_rows(robustness))
    for line in certainty_lines(measured):
        console.print(line)
    _print_example(work)
    if update is not None:
        write_section(update, SECTION, to_markdown(stages, robustness))
        console.print(f"updated: {update}")
    return [
        *shortfalls(stages["radiology"], stages["instruct"]),
        *robustness_shortfalls(robustness),
        *certainty_shortfalls(measured),
    ]


def _print_table(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1, section: int = 0
) -> None:
    """Print a table; its first columns hold names, and a line follows each ``section`` rows."""
    table = Table(title=title)
    for number, column in enumerate(head):
        table.add_column(column, justify="left" if number < num_names else "right")
    for number, row in enumerate(rows, 1):
        table.add_row(*row, end_section=section > 0 and number % section == 0)
    console.print(table)


def _print_example(work: Path) -> None:
    """One question with the answer of each stage."""
    from babydoctor.eval.ask import predictions_file, read_predictions
    from babydoctor.phantom.case import load_cases

    case = next(case for case in load_cases(work / "phantoms", "held_out") if case.finding == "fracture")
    # Answers can hold anything, such as "[/INST]", which rich would parse as markup.
    console.print(f"One question, {QUESTIONS['finding'][0]!r} (truth: {case.finding}):", markup=False)
    for stage in STAGES:
        predictions = read_predictions(predictions_file(work / "scores" / stage, "right"))
        (answer,) = (prediction.answer for prediction in predictions if prediction.id == f"{case.id}-finding")
        console.print(f"  after {stage:<10} {answer!r}", markup=False)


def try_out(work: Path, *, ask_all: bool) -> list[str]:
    """Ask about a held-out phantom in this process and, with ``ask_all``, show what the web UI's examples answered.

    Returns the wrong answers to the examples, in words.
    """
    from babydoctor.demo.first_contact import FILE_NAME, show_answers
    from babydoctor.demo.pictures import ask_about
    from babydoctor.phantom.case import load_cases

    case = next(case for case in load_cases(work / "phantoms", "held_out") if case.finding == "fracture")
    image = work / "phantoms" / "images" / case.image
    question = REPORT_QUESTION.split("\n")[0]
    run = os.path.relpath(work / "radiology")
    command = f'babydoctor chat {run} --image {os.path.relpath(image)} "{question}"'
    console.print(f"\n[bold]{escape(command)}[/]")
    (answer,) = ask_about(work / "radiology", [image], question, max_new_tokens=256)
    console.print(answer, markup=False)
    console.print(f"[dim]truth: {case.modality}, {case.finding}, {case.side} {case.level}[/]")
    return show_answers(work / "scores" / FILE_NAME, console) if ask_all else []
