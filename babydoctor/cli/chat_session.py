"""One question about one image on the terminal, or a conversation about it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from babydoctor.conversation import get_template, render_prompt
from babydoctor.data.tokens import encode
from babydoctor.engine.engine import Engine
from babydoctor.engine.request import Delta, Finished, GenerationRequest, ImageInput, PromptTooLongError
from babydoctor.engine.settings import build_settings
from babydoctor.imaging.dicom import read_dicom
from babydoctor.imaging.isolation import load_image, render
from babydoctor.imaging.load import is_dicom, log_warnings
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import IMAGE_TOKEN, Example, Turn, UserError


class Chat:
    """A conversation with a run about at most one image. Use as a context manager: it owns an engine.

    The KV cache holds one request: the first question and its answer, or what the run was trained on and one answer.
    """

    def __init__(
        self,
        run: Run,
        image: Path | None,
        *,
        question: str | None = None,
        frame: int = 0,
        preset: str | None = None,
        max_new_tokens: int = 256,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the engine.

        Args:
            question: the only question that will be asked; None: a conversation.
            frame: which frame of a DICOM file is shown.
            preset: CT window of a DICOM file.
            max_new_tokens: longest answer.
            engine: settings of the engine that replace the defaults.
        """
        self.run = run
        self.template = get_template(run.manifest.template)
        self.turns: list[Turn] = []
        self.images: tuple[ImageInput, ...] = ()
        self.max_new_tokens = max_new_tokens
        if image is not None:
            pixels = to_pixels(open_picture(image, frame, preset), run.manifest.image)
            self.images = (ImageInput(hashlib.sha256(pixels.tobytes()).hexdigest(), pixels),)
        num_prompt = run.manifest.max_length if question is None else len(self._encode(self._add_turn(question)))
        context = min(num_prompt + max_new_tokens, run.model.language_model.config.max_position_embeddings)
        settings = build_settings(engine or {}, max_running=1, cached_slots=0, max_context=context)
        self.engine = Engine(run.model, run.tokenizer, settings)

    def __enter__(self) -> Chat:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def ask(self, question: str, *, temperature: float = 0.0) -> Iterator[str]:
        """Yield the answer piece by piece; earlier turns are remembered."""
        turns = self._add_turn(question)
        prompt = self._encode(turns)
        request = GenerationRequest(
            input_ids=prompt.input_ids,
            image_mask=prompt.image_mask,
            images=self.images,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            stop=(self.template.stop,),
        )
        try:
            handle = self.engine.submit(request)
        except PromptTooLongError as error:
            raise UserError(
                f"{error}; raise engine.max_context={self.engine.max_context}, or begin a new conversation"
            ) from None
        for event in handle:
            if isinstance(event, Delta):
                yield event.text
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise event.error
                self.turns = [*turns, Turn("assistant", event.text.strip())]

    def _add_turn(self, question: str) -> list[Turn]:
        text = f"{IMAGE_TOKEN}\n{question}" if self.images and not self.turns else question
        return [*self.turns, Turn("user", text)]

    def _encode(self, turns: Sequence[Turn]) -> Example:
        return encode(render_prompt(turns, self.template), self.run.tokenizer, self.run.model.num_patches)


def open_picture(path: Path, frame: int = 0, preset: str | None = None) -> Image.Image:
    """A picture file, or one frame of a DICOM file under a window preset, as RGB.

    Raises:
        UserError: it cannot be read, or a frame or preset was named and it is no DICOM.
    """
    if frame == 0 and preset is None:
        return load_image(path)
    if not path.is_file():
        raise UserError(f"{path}: no such image file")
    data = path.read_bytes()
    if not is_dicom(data):
        raise UserError(f"{path} is no DICOM file; --frame and --preset are for DICOM")
    image = render(read_dicom(data, name=str(path)), frame=frame, preset=preset)
    log_warnings(image, str(path))
    return image


def answer(
    path: Path,
    image: Path | None,
    question: str | None,
    *,
    frame: int = 0,
    preset: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    engine: Mapping[str, Any] | None = None,
) -> None:
    """Print the answer to one question as it comes; without a question, ask for them until the input ends."""
    with Chat(
        load_run(path),
        image,
        question=question,
        frame=frame,
        preset=preset,
        max_new_tokens=max_new_tokens,
        engine=engine,
    ) as chat:
        if question is not None:
            _print_stream(chat.ask(question, temperature=temperature))
            return
        print("For research only; never a replacement for a doctor. An empty line ends the chat.")
        while line := _read_line():
            _print_stream(chat.ask(line, temperature=temperature))


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_stream(pieces: Iterator[str]) -> None:
    first = True
    for piece in pieces:
        sys.stdout.write(piece.lstrip() if first else piece)
        sys.stdout.flush()
        first = first and not piece.strip()
    print()
