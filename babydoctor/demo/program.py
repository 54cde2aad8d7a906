"""The steps of the demonstration. Each leaves something finished behind and is skipped when that is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from babydoctor.config import load_config
from babydoctor.demo.score import StageScore, score_run, shortfalls
from babydoctor.demo.show import draw_cases, markdown, print_table
from babydoctor.model.checkpoint import atomic_directory, write_text
from babydoctor.schema import UserError

STAGES = ("align", "instruct", "radiology")
NUM_TRAIN, NUM_HELD_OUT, IMAGE_SIZE, SEED = 4800, 480, 84, 0
CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"

QUESTION = "What is the main finding?"


class Demo:
    """The demonstration in one directory: ``phantoms/``, ``base/``, ``runs/STAGE/``, ``cases.png``, ``scores.md``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.phantoms = directory / "phantoms"
        self.base = directory / "base"

    def run_directory(self, stage: str) -> Path:
        return self.directory / "runs" / stage

    def make_phantoms(self) -> None:
        """Generate the phantoms: images, the three training sets, held-out questions."""
        from babydoctor.prepare.phantom import write_phantoms

        if not self.phantoms.is_dir():
            with atomic_directory(self.phantoms) as directory:
                write_phantoms(directory, num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=SEED, size=IMAGE_SIZE)

    def make_base(self) -> None:
        """Train the tiny CLIP and the tiny LLaMA from scratch on the training split."""
        from babydoctor.prepare.tiny import TinySettings, make_tiny_base

        make_tiny_base(self.phantoms, self.base, TinySettings(seed=SEED))

    def train_stage(self, stage: str) -> None:
        """Run one stage, or go on with it where it was interrupted."""
        from babydoctor.train.loop import train

        path = CONFIGS / f"{stage}.yaml"
        if not path.is_file():
            raise UserError(f"{path} is not there; the demo runs from a checkout of the repository")
        overrides = [
            f"output_dir={self.run_directory(stage)}",
            f"data.rows={self.phantoms / f'{stage}_train.json'}",
            f"data.eval_rows={self.phantoms / f'{stage}_held_out.json'}",
            f"data.images={self.phantoms / 'images'}",
        ]
        if stage == STAGES[0]:
            overrides += [f"model.language_model={self.base / 'llama'}", f"model.vision_tower={self.base / 'clip'}"]
        else:
            overrides.append(f"init_from={self.run_directory(STAGES[STAGES.index(stage) - 1])}")
        if not (self.run_directory(stage) / "manifest.json").is_file():
            train(load_config(path, overrides), resume=True)

    def score(self) -> list[StageScore]:
        """Score each stage; write the table and the picture of cases."""
        scores = [score_run(self.run_directory(stage), self.phantoms, name=stage) for stage in STAGES]
        write_text(self.directory / "scores.md", markdown(scores))
        draw_cases(scores[-1], self.phantoms, self.directory / "cases.png")
        return scores


def run_demo(directory: Path, *, check: bool) -> int:
    """Run all steps; with ``check`` nothing waits for input. Returns the exit status."""
    demo = Demo(directory)
    print("BabyDoctor's tiny preset. For research only; never a replacement for a doctor.", flush=True)
    begun = time.monotonic()
    steps: list[tuple[str, Callable[[], None]]] = [
        ("phantoms", demo.make_phantoms),
        ("tiny base: CLIP and LLaMA from scratch", demo.make_base),
        ("stage 1, align: the projector", lambda: demo.train_stage("align")),
        ("stage 2, instruct: LoRA", lambda: demo.train_stage("instruct")),
        ("stage 3, radiology: 4-bit QLoRA", lambda: demo.train_stage("radiology")),
    ]
    for title, step in steps:
        _timed(title, step)
    scores: list[StageScore] = []
    _timed("score on held-out phantoms", lambda: scores.extend(demo.score()))
    print_table(scores)
    print(f"pictures of cases: {demo.directory / 'cases.png'}; table: {demo.directory / 'scores.md'}")
    print(f"all of it took {time.monotonic() - begun:.0f} s", flush=True)
    missing = shortfalls(scores)
    for line in missing:
        print(f"falls short: {line}")
    serve(demo, check=check)
    return 1 if missing else 0


def serve(demo: Demo, *, check: bool) -> None:
    """Serve the last stage with controller, worker and page; with ``check`` ask once on each wire, then stop."""
    from babydoctor.commands.serve import serve as serve_command

    run = demo.run_directory(STAGES[-1])
    if not check:
        serve_command(run)
        return
    from babydoctor.prepare.phantom import load_cases
    from babydoctor.serve.client import Client
    from babydoctor.serve.launch import launched

    image = (demo.phantoms / "images" / load_cases(demo.phantoms, "held_out")[0].image).read_bytes()
    ports = ["controller.port=0", "worker.port=0", "page.port=0"]
    with launched(run, overrides=ports) as served, Client(served.controller_url) as client:
        (model,) = client.models()
        print(f"served at {served.controller_url}: {QUESTION}")
        print(f"  LLaVA wire:  {client.ask_llava(model, QUESTION, image)}")
        print(f"  OpenAI wire: {client.ask_openai(model, QUESTION, image)}", flush=True)


def _timed(title: str, step: Callable[[], None]) -> None:
    print(f"== {title}", flush=True)
    begun = time.monotonic()
    step()
    print(f"   {time.monotonic() - begun:.0f} s", flush=True)
