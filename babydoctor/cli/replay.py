"""``babydoctor replay``: render the images of an exported session again, and ask its questions again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from babydoctor.runtime import prepare_engine, prepare_inference

if TYPE_CHECKING:
    from babydoctor.serve.page.replay.ask import NewAnswer
    from babydoctor.serve.page.replay.images import ReplayedView
    from babydoctor.serve.page.replay.session_file import RecordedSession

_STATUS = {
    "same": "rendered again: the same pixels",
    "differs": "[bold red]the pixels differ[/]",
    "not_found": "[bold red]missing[/]",
    "from_export": "the pixels of the export",
}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(replay)


def replay(
    session: Annotated[Path, typer.Argument(help="HTML file that the web UI has exported, or the JSON in it")],
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder with the images; they are found by their hashes. Default: the pixels of the export"),
    ] = None,
    url: Annotated[Optional[str], typer.Option(help="ask this controller")] = None,  # noqa: UP045
    run: Annotated[Optional[Path], typer.Option(help="ask this run in this process")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option(help="with --url: another model than recorded")] = None,  # noqa: UP045
) -> None:
    """Compare the recorded answers of a session with new ones. Without --url and --run only the pixels are compared.

    Exit status: 1 if an image is missing or its pixels differ from the recorded ones.
    """
    from rich.console import Console
    from rich.markup import escape

    from babydoctor.schema import UserError
    from babydoctor.serve.page.replay.images import replay_views
    from babydoctor.serve.page.replay.session_file import read_session

    if url is not None and run is not None:
        raise UserError("give --url or --run, not both")
    recorded = read_session(session)
    views = replay_views(recorded, images)
    console = Console(highlight=False)
    for number, (view, before) in enumerate(zip(views, recorded.views, strict=True), start=1):
        console.print(f"Image {number}: {_STATUS[view.status]}. {escape(view.note)}".strip())
        console.print(before.caption or "as loaded", style="dim", markup=False)
    if url is not None or run is not None:
        _print(console, recorded, _ask(recorded, views, url, run, model))
    if any(view.status in ("differs", "not_found") for view in views):
        raise typer.Exit(1)


def _ask(
    recorded: RecordedSession, views: Sequence[ReplayedView], url: str | None, run: Path | None, model: str | None
) -> list[NewAnswer]:
    from babydoctor.progress import progress_bars
    from babydoctor.serve.page.replay.ask import ask_run, ask_server
    from babydoctor.serve.settings import load_secrets

    with progress_bars() as bars:
        task = bars.add_task("asking again", total=len(recorded.answers))

        def tell(num_done: int) -> None:
            bars.update(task, completed=num_done)

        if url is not None:
            keys = load_secrets().api_keys
            key = keys[0] if keys else None
            return asyncio.run(ask_server(url, recorded.answers, views, model=model, api_key=key, tell=tell))
        assert run is not None
        prepare_inference()
        return ask_run(run, recorded.answers, views, engine={"on_start": prepare_engine}, tell=tell)


def _print(console: object, recorded: RecordedSession, new: Sequence[NewAnswer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    table = Table("Question", "Image", "Recorded", "Now", "", show_lines=True)
    for before, now in zip(recorded.answers, new, strict=True):
        is_same = not now.problem and now.text == before.answer.strip()
        shown = Text(now.text) if not now.problem else Text(f"{now.text}\n({now.problem})".strip())
        mark = "same" if is_same else "differs"
        table.add_row(Text(before.question), str(before.view + 1), Text(before.answer.strip()), shown, mark)
    console.print(table)
    if any(answer.sampling.temperature > 0 for answer in recorded.answers):
        console.print("Answers at a temperature above 0 differ from one time to the next.")
