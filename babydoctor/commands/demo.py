"""``babydoctor demo | tiny-base``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(demo)
    app.command()(tiny_base)


def demo(
    check: Annotated[
        bool, typer.Option("--check", help="ask for nothing; exit status 1 if the score falls short")
    ] = False,
    directory: Annotated[Path, typer.Option("--dir", help="where everything goes; finished steps are kept")] = Path(
        ".demo"
    ),
) -> None:
    """The whole job on the tiny preset: phantoms, base, three stages, score, page."""
    from babydoctor.demo.program import run_demo

    raise typer.Exit(run_demo(directory, check=check))


def tiny_base(
    phantoms: Annotated[Path, typer.Option(help="folder that `babydoctor data phantom` wrote")],
    out: Annotated[Path, typer.Option(help="folder for clip/ and llama/")],
    seed: Annotated[int, typer.Option(help="the same seed gives the same base")] = 0,
) -> None:
    """Train the tiny preset's CLIP and LLaMA from scratch on the phantoms' training split."""
    from babydoctor.prepare.tiny import make_tiny_base

    make_tiny_base(phantoms, out, seed=seed)
