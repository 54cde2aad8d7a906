"""``babydoctor bench train | serve``: measured speed on random weights, nothing downloaded."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="Measure speed on this machine with random weights.", no_args_is_help=True)
    group.command("serve")(serve)
    app.add_typer(group, name="bench")


def serve(
    preset: Annotated[Literal["mini", "7b"], typer.Option(help="size of the model; 7b needs a GPU")] = "mini",
    users: Annotated[str, typer.Option(help="numbers of concurrent users, with commas")] = "1,16",
    requests_per_user: Annotated[int, typer.Option(min=1)] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of each answer")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="the fastest one counts")] = 3,
    engine_only: Annotated[bool, typer.Option("--engine-only", help="without the worker's HTTP")] = False,
) -> None:
    """Tokens a second, time to the first token and time per token, for one user and for many."""
    import tempfile
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from babydoctor.schema import UserError
    from babydoctor.serve.bench import run_bench

    try:
        numbers = tuple(int(number) for number in users.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"--users {users!r} must be whole numbers with commas between them, for example 1,16")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="babydoctor-bench-") as folder, console.status("starting") as status:
        report = run_bench(
            preset,
            Path(folder),
            users=numbers,
            requests_per_user=requests_per_user,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            engine_only=engine_only,
            on_event=status.update,
        )
    table = Table(
        "users", "tokens/s", "requests/s", "first token p50", "p95", "per token p50", "p95", title=None, box=None
    )
    for row in report.figures:
        table.add_row(
            str(row.num_users),
            f"{row.tokens_per_s:.0f}",
            f"{row.requests_per_s:.2f}",
            f"{row.first_token_p50_s:.3f} s",
            f"{row.first_token_p95_s:.3f} s",
            f"{row.per_token_p50_s * 1e3:.1f} ms",
            f"{row.per_token_p95_s * 1e3:.1f} ms",
        )
    console.print(f"{report.preset}, {report.through}, {report.device}; {max_new_tokens} new tokens an answer")
    console.print(table)
    console.print(
        f"peak memory {report.peak_bytes / 2**20:.0f} MiB; bf16 matmul {report.matmul_flops_per_s / 1e12:.2f} TFLOP/s"
    )
