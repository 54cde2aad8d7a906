"""``babydoctor demo | tiny-base``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from babydoctor.runtime import hide_saving_progress, prepare_training


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

    prepare_training()
    hide_saving_progress()
    status = run_demo(dir, check=check, update=update)
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

    prepare_training()
    hide_saving_progress()
    make_tiny_base(phantoms, out, TinySettings(seed=seed))
    print(f"vision tower: {out / 'clip'}  language model: {out / 'llama'}")
