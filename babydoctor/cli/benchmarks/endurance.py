"""``babydoctor bench soak | chaos``: servers under load for minutes, in peace and under attack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def soak(
    run: Annotated[Optional[Path], typer.Argument(help="run directory; default: the mini model")] = None,  # noqa: UP045
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="settings, for example limits.max_queue=16"),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="concurrent clients, of whom a tenth leave early")] = 200,
    seconds: Annotated[float, typer.Option(min=1, help="how long")] = 180,
    workers: Annotated[int, typer.Option(min=1, help="each holds a copy of the model")] = 1,
) -> None:
    """Many clients for minutes: exit 1 unless 429 is the only refusal, no place leaks and memory stays flat."""
    import tempfile

    from rich.console import Console

    from babydoctor.bench.endurance.soak import run_soak
    from babydoctor.runtime import prepare_bench

    prepare_bench()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="babydoctor-soak-") as folder, console.status("starting") as status:
        report = run_soak(
            run,
            Path(folder),
            overrides=overrides or [],
            clients=clients,
            seconds=seconds,
            workers=workers,
            on_event=status.update,
        )
    for line in report.lines():
        console.print(line, soft_wrap=True, markup=False)
    faults = report.faults()
    for fault in faults:
        console.print(f"fault: {fault}", style="red", soft_wrap=True, markup=False)
    if faults:
        raise typer.Exit(1)
    console.print("no fault: 429 was the only refusal, every place is free again, memory stayed flat")


def chaos(
    run: Annotated[Optional[Path], typer.Argument(help="run directory; default: the mini model")] = None,  # noqa: UP045
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="settings, for example limits.max_queue=16"),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="concurrent clients with known answers")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="how long")] = 300,
    workers: Annotated[int, typer.Option(min=1, help="each holds a copy of the model")] = 2,
    every: Annotated[float, typer.Option(min=1, help="seconds between two kills")] = 10,
) -> None:
    """Kill parts, stall connections and send hostile files under load: exit 1 on a wrong answer or a hang."""
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from babydoctor.bench.endurance.chaos import run_chaos
    from babydoctor.runtime import prepare_bench

    prepare_bench()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="babydoctor-chaos-") as folder, console.status("starting") as status:
        report = run_chaos(
            run,
            Path(folder),
            overrides=overrides or [],
            clients=clients,
            seconds=seconds,
            workers=workers,
            attack_every_s=every,
            on_event=status.update,
        )
    table = Table("what", "number", "how it ended", box=None)
    for kind, number, ends in report.rows():
        table.add_row(kind, str(number), ends)
    console.print(table)
    console.print(
        f"{report.seconds:.0f} s, {report.restarts} restarts, longest request {report.longest_s:.1f} s, "
        f"all ready again {report.seconds_to_recover:.1f} s after the end"
    )
    faults = report.faults()
    for fault in faults:
        console.print(f"fault: {fault}", style="red", soft_wrap=True, markup=False)
    if faults:
        raise typer.Exit(1)
    console.print("no fault: every complete answer was right, nothing hung, everything came back")
