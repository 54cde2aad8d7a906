"""``babydoctor train | merge``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)
    app.command()(merge)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage, for example configs/align.yaml")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's")  # noqa: UP045
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in output_dir")] = False,
) -> None:
    """Train one stage.

    Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint after the current step and stops with exit status 130, 143 or 138.
    A second Ctrl-C stops immediately. Exit status 2: an error in the configuration or the data; the message says how to
    fix it.
    """
    from babydoctor.config import load_config

    settings = load_config(config, overrides or [])
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from babydoctor.runtime import prepare_training, settle_training_memory

    prepare_training()
    from babydoctor.train.loop import train as run_stage

    run_stage(settings, resume=resume, on_memory_stable=settle_training_memory)


def merge(
    run: Annotated[Path, typer.Argument(help="run directory")],
    out: Annotated[Path, typer.Option(help="directory to write; must not exist")],
    dtype: Annotated[
        Optional[str], typer.Option(help="float32 or bfloat16; default: the run's")  # noqa: UP045
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Merge a run's LoRA into plain weights and check the logits. The same command continues an interrupted merge."""
    import torch

    from babydoctor.model.merge import merge_run
    from babydoctor.schema import UserError

    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r} is not float32 or bfloat16")
    try:
        report = merge_run(run, out, dtype=getattr(torch, dtype) if dtype else None, device=device)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {out}.partial keeps the finished part. Run the same command to continue.", err=True)
        raise
    print(f"{out}: logits differ by at most {report.difference:.2g} (largest logit {report.scale:.3g})")
