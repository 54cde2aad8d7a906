"""``babydoctor doctor | train | merge | chat``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage, for example configs/align.yaml")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's")  # noqa: UP045
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run in output_dir stopped")] = False,
) -> None:
    """Train one stage."""
    from babydoctor.config import load_config

    settings = load_config(config, overrides or [])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from babydoctor.train.loop import train as run_stage

    run_stage(settings, resume=resume)
