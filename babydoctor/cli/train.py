"""``babydoctor train | merge | chat``."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command()(train)
    app.command()(merge)
    app.command()(chat)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage, for example configs/align.yaml")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's")  # noqa: UP045
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in output_dir")] = False,
) -> None:
    """Train one stage.

    Ctrl-C, SIGTERM or SIGUSR1 saves a checkpoint at the end of the step and stops with exit status 130, 143 or 138;
    a second Ctrl-C ends at once. Exit status 2: a mistake that the message explains.
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
    """Fold a run's LoRA into plain weights, checked by logits. After an interruption the same command continues."""
    import torch

    from babydoctor.model.merge import merge_run
    from babydoctor.schema import UserError

    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype!r} is not float32 or bfloat16")
    try:
        report = merge_run(run, out, dtype=getattr(torch, dtype) if dtype else None, device=device)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {out}.partial keeps what is finished. The same command continues there.", err=True)
        raise
    print(f"{out}: logits differ by at most {report.difference:.2g} (largest logit {report.scale:.3g})")


def chat(
    run: Annotated[Path, typer.Argument(help="run directory")],
    question: Annotated[Optional[str], typer.Argument(help="without it, a conversation")] = None,  # noqa: UP045
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[engine.KEY=VALUE]...", help="engine settings, for example engine.max_context=1024"),
    ] = None,
    image: Annotated[Optional[Path], typer.Option(help="PNG, JPEG or DICOM")] = None,  # noqa: UP045
    frame: Annotated[int, typer.Option(min=0, help="which frame of a DICOM loop, from 0")] = 0,
    preset: Annotated[Optional[str], typer.Option(help="CT window of a DICOM: lung, bone, ...")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
) -> None:
    """Ask a run about an image; the answer streams to the terminal."""
    from babydoctor.cli.chat_session import answer
    from babydoctor.engine.settings import parse_overrides
    from babydoctor.runtime import prepare_engine

    words = list(overrides or [])
    if question is not None and re.match(r"engine\.\w+=", question):  # a conversation with settings
        words.insert(0, question)
        question = None
    answer(
        run,
        image,
        question,
        frame=frame,
        preset=preset,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        engine={**parse_overrides(words), "on_start": prepare_engine},
    )
