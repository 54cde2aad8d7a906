"""Ask what a new user tries first: each example of the web UI with each ready-made question and the README's question.

The questions go through a running controller and worker in three ways: as the web UI asks, over LLaVA's protocol, and
over OpenAI's API.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from babydoctor.demo.robustness import is_correct
from babydoctor.files import write_json
from babydoctor.phantom.text import REPORT_QUESTION, term_reply
from babydoctor.serve.client import Client
from babydoctor.serve.launch import launched
from babydoctor.serve.page.controller_client import ControllerClient
from babydoctor.serve.page.examples import ExampleCase, build_examples
from babydoctor.serve.page.scan import open_scan
from babydoctor.serve.page.session import AnswerSettings, Exchange, Session
from babydoctor.serve.page.texts import QUESTIONS

KIND_OF = {
    "What kind of scan is this?": "modality",
    "Which modality is this?": "modality",
    "What is the main finding?": "finding",
    "On which side of the patient is the finding?": "side",
    "Describe the image.": "report",
    "What does the image show?": "report",
    REPORT_QUESTION.split("\n")[0]: "report",
}
"""What the ready-made questions, the examples' own questions and those of the README ask for."""


FILE_NAME = "first_contact.json"


@dataclass(frozen=True)
class FirstAnswer:
    """An answer to one of the questions.

    ``way`` is "web UI", "web UI, same conversation" (after the ready-made questions before it), "LLaVA API" or
    "OpenAI API".
    """

    example: str
    question: str
    way: str
    answer: str
    right: str
    is_correct: bool


def measure(run: Path, out: Path) -> None:
    """Ask everything and write the answers to ``out`` (JSON)."""
    write_json(out, [asdict(answer) for answer in ask_everything(run)])


def ask_everything(run: Path, examples: list[ExampleCase] | None = None) -> list[FirstAnswer]:
    """Start controller, worker and web UI on free ports, ask everything in all ways, and stop them."""
    phantoms = [example for example in examples or build_examples() if example.case is not None]
    ports = ["controller.port=0", "worker.port=0", "page.port=0"]
    with launched(run, overrides=ports) as served, Client(served.controller_url) as client:
        (model,) = client.models()
        answers: list[FirstAnswer] = []
        for example in phantoms:
            answers += _ask_about(example, served.controller_url, client, model)
    return answers


def _ask_about(example: ExampleCase, url: str, client: Client, model: str) -> Iterator[FirstAnswer]:
    given: dict[tuple[str, str], str] = {}
    for question in KIND_OF:
        (given["web UI", question],) = asyncio.run(ask_as_web_ui(url, model, example, [question]))
        given["LLaVA API", question] = client.ask_llava(model, question, example.load())
        given["OpenAI API", question] = client.ask_openai(model, question, example.load())
    chips = asyncio.run(ask_as_web_ui(url, model, example, QUESTIONS))
    given |= {("web UI, same conversation", q): answer for q, answer in zip(QUESTIONS, chips, strict=True)}
    assert example.case is not None
    for (way, question), answer in given.items():
        kind = KIND_OF[question]
        right = term_reply(kind, example.case)
        yield FirstAnswer(example.title, question, way, answer, right, is_correct(answer, kind, example.case))


async def ask_as_web_ui(url: str, model: str, example: ExampleCase, questions: Sequence[str]) -> list[str]:
    """Open the example as a click on it does, and ask one question after the other at temperature 0."""
    client = ControllerClient(url)
    session = Session()
    session.load(open_scan(example.load()))
    assert session.scan is not None
    view = session.scan.view()
    try:
        for question in questions:
            exchange = Exchange(question, model, AnswerSettings(0.0, 1.0, 256), view)
            turns = session.turns(question)
            session.exchanges.append(exchange)
            async for _ in client.answer(exchange, turns):
                pass
    finally:
        await client.aclose()
    return [exchange.answer.strip() for exchange in session.exchanges]


def wrong_answers(answers: list[FirstAnswer]) -> list[str]:
    """What is wrong, in words."""
    return [
        f"{a.example}, {a.question!r} ({a.way}): {a.answer!r} instead of {a.right!r}"
        for a in answers
        if not a.is_correct
    ]


def show_answers(path: Path, console: Console) -> list[str]:
    """Print the answers that ``measure`` wrote, those over OpenAI's API in full. Returns the wrong ones, in words."""
    console.print("\n[bold]The web UI's examples and ready-made questions, asked over HTTP[/]")
    answers = [FirstAnswer(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    for answer in answers:
        if answer.way == "OpenAI API":
            console.print(f"  {answer.example}: {answer.question} {answer.answer}", markup=False)
    wrong = wrong_answers(answers)
    console.print(f"{len(answers) - len(wrong)} of {len(answers)} answers are right")
    return wrong
