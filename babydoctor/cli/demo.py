"""``babydoctor demo | tiny-base``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from babydoctor.runtime import die_with_parent, hide_saving_progress, prepare_process, prepare_training


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(demo)
    app.command("tiny-base")(tiny_base)


def demo(
    check: Annotated[
        bool, typer.Option("--check", help="start no web UI; exit status 1 if the score is too low")
    ] = False,
    dir: Annotated[Path, typer.Option("--dir", help="work directory; delete it to start over")] = Path(".demo"),
    update: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="write the score table between its markers in this Markdown file"),
    ] = None,
) -> None:
    """Train a tiny BabyDoctor from scratch: phantoms, base models, three stages, scores, web UI."""
    from babydoctor.demo.demo import run_demo

    _prepare()
    status = run_demo(dir, check=check, update=update, prepare=partial(_prepare_step, os.getpid()))
    if not check:
        from babydoctor.cli.serve import serve

        serve(dir / "radiology")
    raise typer.Exit(status)


def tiny_base(
    phantoms: Annotated[Path, typer.Option(help="folder that `babydoctor data phantom` wrote")],
    out: Annotated[Path, typer.Option(help="folder for clip/ and llama/; existing ones are kept")],
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Train the tiny preset's base models (CLIP tower, tokenizer, LLaMA) on phantoms."""
    from babydoctor.demo.tiny_language import TinySettings, make_tiny_base

    _prepare()
    make_tiny_base(phantoms, out, TinySettings(seed=seed))
    print(f"vision tower: {out / 'clip'}  language model: {out / 'llama'}")


def _prepare() -> None:
    prepare_training()
    hide_saving_progress()


def _prepare_step(parent: int) -> None:
    """Switches of a process that ``demo`` starts for steps. It ends with its parent."""
    die_with_parent(str(parent))
    prepare_process()
    _prepare()
