"""Ask the questions of a recorded session again, through a controller or with a run loaded in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.schema import UserError
from babydoctor.serve.page.replay.images import ReplayedView
from babydoctor.serve.page.replay.session_file import RecordedAnswer
from babydoctor.serve.page.session import Exchange
from babydoctor.serve.page.texts import PageError
from babydoctor.serve.page.viewer.view import View

if TYPE_CHECKING:
    from babydoctor.inference import Query
    from babydoctor.model.run_dir import Run


@dataclass(frozen=True)
class NewAnswer:
    """A new answer. ``problem`` says why there is none."""

    text: str = ""
    problem: str = ""


Tell = Callable[[int], Any]
"""Called with the number of answers so far."""


async def ask_server(
    url: str,
    answers: Sequence[RecordedAnswer],
    views: Sequence[ReplayedView],
    *,
    model: str | None,
    api_key: str | None,
    tell: Tell,
) -> list[NewAnswer]:
    """Ask a controller. Each question is sent with the recorded turns before it.

    Args:
        model: name of the model. None: the recorded one.
    """
    from babydoctor.serve.page.controller_client import ControllerClient

    client = ControllerClient(url, api_key)
    found: list[NewAnswer] = []
    try:
        for answer in answers:
            png = views[answer.view].png
            if png is None:
                found.append(NewAnswer(problem="not asked: the image is missing"))
            else:
                exchange = Exchange(answer.question, model or answer.model, answer.sampling, View(png, 0, 0, ""))
                try:
                    async for _ in client.answer(exchange, answer.turns):
                        pass
                    found.append(NewAnswer(exchange.answer.strip()))
                except PageError as error:
                    found.append(NewAnswer(exchange.answer.strip(), error.sentence))
            tell(len(found))
    finally:
        await client.aclose()
    return found


def ask_run(
    path: Path,
    answers: Sequence[RecordedAnswer],
    views: Sequence[ReplayedView],
    *,
    engine: dict[str, Any],
    tell: Tell,
) -> list[NewAnswer]:
    """Load a run and ask it in this process, on the GPU if there is one.

    Args:
        engine: settings of the engine.

    Raises:
        UserError: the run cannot be loaded.
    """
    from babydoctor.inference import Inference
    from babydoctor.model.run_dir import load_run
    from babydoctor.plan.hardware import choose_device

    asked = [answer for answer in answers if views[answer.view].png is not None]
    if not asked:
        raise UserError("no question can be asked: all images are missing")
    run = load_run(path, device=choose_device("auto"))
    queries = _queries(run, asked, views)
    texts: list[str] = []
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, queries, engine=engine) as inference:
        for answer in inference.answers(queries):
            texts.append(answer.text)
            tell(len(texts))
    new = iter(texts)
    return [
        NewAnswer(problem="not asked: the image is missing") if views[one.view].png is None else NewAnswer(next(new))
        for one in answers
    ]


def _queries(run: Run, answers: Sequence[RecordedAnswer], views: Sequence[ReplayedView]) -> list[Query]:
    from babydoctor.imaging.isolation import load_pixels
    from babydoctor.inference import Query

    pixels = {
        index: load_pixels(view.png, run.manifest.image) for index, view in enumerate(views) if view.png is not None
    }
    return [
        Query(
            answer.turns,
            pixels[answer.view],
            max_new_tokens=answer.sampling.max_new_tokens,
            temperature=answer.sampling.temperature,
            top_p=answer.sampling.top_p,
        )
        for answer in answers
    ]
