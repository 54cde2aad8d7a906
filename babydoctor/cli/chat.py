"""``babydoctor chat``: ask one question about an image, or hold a conversation, on the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from babydoctor.runtime import prepare_engine, prepare_inference

if TYPE_CHECKING:
    from PIL import Image


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(chat)


def chat(
    run: Annotated[Path, typer.Argument(help="run directory")],
    question: Annotated[Optional[str], typer.Argument(help="default: a conversation")] = None,  # noqa: UP045
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[engine.KEY=VALUE]...", help="engine settings, for example engine.max_context=1024"),
    ] = None,
    image: Annotated[Optional[Path], typer.Option(help="PNG, JPEG or DICOM")] = None,  # noqa: UP045
    frame: Annotated[int, typer.Option(min=0, help="frame of a multi-frame DICOM, from 0")] = 0,
    preset: Annotated[Optional[str], typer.Option(help="CT window of a DICOM: lung, bone, ...")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer in tokens")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Ask a run about an image. The answer streams to the terminal."""
    from babydoctor.engine.settings import parse_overrides
    from babydoctor.imaging.preprocess import to_pixels
    from babydoctor.inference import open_conversation
    from babydoctor.model.run_dir import load_run
    from babydoctor.plan.hardware import choose_device

    settings = list(overrides or [])
    if question is not None and re.match(r"engine\.\w+=", question):  # a conversation with settings
        settings.insert(0, question)
        question = None
    engine = {**parse_overrides(settings), "on_start": prepare_engine}
    prepare_inference()
    loaded = load_run(run, device=choose_device(device))
    pixels = None if image is None else to_pixels(open_image(image, frame, preset), loaded.manifest.image)
    conversation = open_conversation(
        loaded, pixels, question=question, max_new_tokens=max_new_tokens, engine=engine, own_weights=True
    )
    with conversation.inference:
        if question is not None:
            _print_stream(conversation.ask(question, temperature=temperature))
            return
        print("For research only; never a replacement for a doctor. An empty line ends the conversation.")
        while line := _read_line():
            _print_stream(conversation.ask(line, temperature=temperature))


def open_image(path: Path, frame: int = 0, preset: str | None = None) -> Image.Image:
    """Read an image file, or one frame of a DICOM file under a window preset, as RGB.

    Raises:
        UserError: the file cannot be read, or a frame or preset is given for a file that is not DICOM.
    """
    from babydoctor.imaging.dicom import is_dicom, read_dicom
    from babydoctor.imaging.isolation import load_image, render
    from babydoctor.imaging.load import log_warnings
    from babydoctor.schema import UserError

    if frame == 0 and preset is None:
        return load_image(path)
    if not path.is_file():
        raise UserError(f"{path}: no such image file; check --image")
    data = path.read_bytes()
    if not is_dicom(data):
        raise UserError(f"{path} is not a DICOM file; leave out --frame and --preset")
    image = render(read_dicom(data, name=str(path)), frame=frame, preset=preset)
    log_warnings(image, str(path))
    return image


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_stream(pieces: Iterator[str]) -> None:
    started = False
    for piece in pieces:
        sys.stdout.write(piece if started else piece.lstrip())
        sys.stdout.flush()
        started = started or bool(piece.strip())
    print()
