"""``babydoctor bench soak | chaos``: servers under load for minutes, without and with attacks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.console import Console

RunDirectory = Annotated[Optional[Path], typer.Argument(help="run directory; default: the mini model")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[KEY=VALUE]...", help="settings, for example limits.max_queue=16"),
]
Seconds = Annotated[float, typer.Option(min=1, help="duration")]
Workers = Annotated[int, typer.Option(min=1, help="each holds a copy of the model")]


def soak(
    run: RunDirectory = None,
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(min=1, help="concurrent clients; a tenth of them disconnect early")] = 200,
    seconds: Seconds = 180,
    workers: Workers = 1,
) -> None:
    """Run many clients for minutes. Exit status 1 unless 429 is the only error, no slot leaks and memory stays flat."""
    from babydoctor.bench.endurance.soak import run_soak

    with _prepared() as (console, folder, on_event):
        report = run_soak(
            run,
            folder,
            overrides=overrides or [],
            clients=clients,
            seconds=seconds,
            workers=workers,
            on_event=on_event,
        )
    for line in report.lines():
        console.print(line, soft_wrap=True, markup=False)
    fine = "429 was the only error, every request slot is free again, memory stayed flat"
    _conclude(console, report.faults(), fine)


def chaos(
    run: RunDirectory = None,
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(min=1, help="concurrent clients with known answers")] = 32,
    seconds: Seconds = 300,
    workers: Workers = 2,
    every: Annotated[float, typer.Option(min=1, help="seconds between two kills")] = 10,
) -> None:
    """Kill parts, stall connections and send hostile files under load. Exit status 1 on a wrong answer or a hang."""
    from rich.table import Table

    from babydoctor.bench.endurance.chaos import run_chaos

    with _prepared() as (console, folder, on_event):
        report = run_chaos(
            run,
            folder,
            overrides=overrides or [],
            clients=clients,
            seconds=seconds,
            workers=workers,
            attack_every_s=every,
            on_event=on_event,
        )
    table = Table("what", "number", "how it ended", box=None)
    for kind, number, ends in report.rows():
        table.add_row(kind, str(number), ends)
    console.print(table)
    console.print(
        f"{report.seconds:.0f} s, {report.restarts} restarts, longest request {report.longest_s:.1f} s, "
        f"all ready again {report.seconds_to_recover:.1f} s after the end"
    )
    _conclude(console, report.faults(), "every complete answer was right, nothing hung, all parts recovered")


@contextmanager
def _prepared() -> Iterator[tuple[Console, Path, Callable[[str], None]]]:
    """A console, a temporary folder and a function that shows the state while the block runs."""
    from rich.console import Console

    from babydoctor.runtime import hide_saving_progress, prepare_bench

    prepare_bench()
    hide_saving_progress()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="babydoctor-bench-") as folder, console.status("starting") as status:
        yield console, Path(folder), status.update


def _conclude(console: Console, faults: Sequence[str], fine: str) -> None:
    """Print the faults and exit with status 1 if there are any."""
    for fault in faults:
        console.print(f"fault: {fault}", style="red", soft_wrap=True, markup=False)
    if faults:
        raise typer.Exit(1)
    console.print(f"no fault: {fine}")
