"""``babydoctor bench``: measurements on random weights or generated rows. Nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from babydoctor.cli.benchmarks.data import data
from babydoctor.cli.benchmarks.endurance import chaos, soak
from babydoctor.cli.benchmarks.guide_table import print_table
from babydoctor.cli.benchmarks.peers import peers

_DEVICE = typer.Option(help="auto, cpu or cuda")
_JSON = typer.Option("--json", metavar="FILE", help="append the figures to this file, one JSON object per line")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    from babydoctor.cli.benchmarks.burned_in_text import measure_burned_in_text

    group = typer.Typer(help="Measure speed on this machine with random weights.", no_args_is_help=True)
    group.command("train")(train)
    group.command("serve")(serve)
    group.command("peers")(peers)
    group.command("soak")(soak)
    group.command("chaos")(chaos)
    group.command("paths")(paths)
    group.command("ranks")(ranks)
    group.command("data")(data)
    group.command("gpu")(gpu)
    group.command("report")(report)
    group.command("rehearse")(rehearse)
    group.command("burned-in-text")(measure_burned_in_text)
    app.add_typer(group, name="bench")


def train(
    preset: Annotated[Literal["mini", "7b"], typer.Option(help="size of the model; 7b needs a GPU")] = "mini",
    stage: Annotated[str, typer.Option(help="align, instruct, radiology, or all")] = "all",
    steps: Annotated[int, typer.Option(min=1, help="measured steps per stage, after two warm-up steps")] = 10,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="samples per step; 8, or 64 for 7b")] = None,  # noqa: UP045
    num_workers: Annotated[int, typer.Option(min=0, help="processes that read images")] = 1,
    memory_cap: Annotated[
        float,
        typer.Option(parser=_gib, metavar="SIZE", help="GPU memory to use, 22.5GiB as on an A10; 0: all"),
    ] = 0,
    device: Annotated[str, _DEVICE] = "auto",
    json_file: Annotated[Optional[Path], _JSON] = None,  # noqa: UP045
) -> None:
    """Measure real training steps of each stage: samples per second, MFU, and memory compared with the plan."""
    from babydoctor.bench.gpu_report import stage_record, write_record
    from babydoctor.bench.train import STAGES, bench_train, projected_hours
    from babydoctor.plan.hardware import choose_device
    from babydoctor.runtime import prepare_bench, settle_training_memory

    prepare_bench()
    device = choose_device(device)
    results = bench_train(
        STAGES if stage == "all" else (stage,),
        preset=preset,
        device=device,
        num_steps=steps,
        batch_size=batch_size or (64 if preset == "7b" else 8),
        num_workers=num_workers,
        memory_cap=round(memory_cap * 2**30) or None,
        on_memory_stable=settle_training_memory,
    )
    for ceiling, result in results:
        if json_file is not None:
            write_record(json_file, "train", stage_record(result, ceiling))
        print(
            f"{result.stage}: {result.samples_per_s:.2f} samples/s (best step {result.best_samples_per_s:.2f}), "
            f"{result.tokens_per_s:,.0f} tokens/s; MFU {result.mfu:.0%} of {ceiling / 1e9:,.0f} GFLOP/s (bfloat16 "
            f"product, measured just before); waits for data {result.data_wait_share:.1%}"
        )
        hours = result.plan.num_steps * result.plan.samples_per_step / result.samples_per_s / 3600
        print(
            f"  peak {result.peak_bytes / 2**20:,.0f} MiB, planned {result.predicted_bytes / 2**20:,.0f} MiB; "
            f"roco-instruct-65k would take {hours:.1f} h here"
        )
        if preset == "7b":
            used = result.mfu * result.plan.flops.total / result.plan.flops.model
            print(f"  and {projected_hours(result, 'a10', min(1.0, used)):.1f} h on an A10 at this share of its peak")


def paths(
    stage: Annotated[str, typer.Option(help="align, instruct or radiology")] = "instruct",
    steps: Annotated[
        int, typer.Option(min=1, help="measured steps with it and without it, after two warm-up steps")
    ] = 8,
    preset: Annotated[Literal["mini", "7b"], typer.Option(help="size of the model; 7b needs a GPU")] = "mini",
    device: Annotated[str, _DEVICE] = "auto",
    json_file: Annotated[Optional[Path], _JSON] = None,  # noqa: UP045
) -> None:
    """Measure what each fast path of training gains: steps with it and without it, alternating."""
    from babydoctor.bench.gpu_report import path_record, write_record
    from babydoctor.bench.paths import bench_paths
    from babydoctor.plan.hardware import choose_device
    from babydoctor.runtime import prepare_bench, settle_training_memory

    prepare_bench()
    print(f"| fast path ({stage}) | without it | samples/s | without | gain | peak MiB | without |")
    print("|---|---|---|---|---|---|---|")
    results = bench_paths(
        stage,
        num_steps=steps,
        preset=preset,
        device=choose_device(device),
        on_memory_stable=settle_training_memory,
    )
    for result in results:
        if json_file is not None:
            write_record(json_file, "paths", path_record(stage, result))
        print(
            f"| {result.path.name} | {result.path.without} | {result.samples_per_s:.2f} | "
            f"{result.samples_per_s_without:.2f} | {result.gain:+.0%} | {result.peak_bytes / 2**20:,.0f} | "
            f"{result.peak_bytes_without / 2**20:,.0f} |",
            flush=True,
        )


def serve(
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[engine.KEY=VALUE]...", help="engine settings, for example engine.num_threads=8"),
    ] = None,
    *,
    preset: Annotated[
        Literal["mini", "7b"], typer.Option(help="size of the model; 7b takes 17 GB, 7 with --nf4")
    ] = "mini",
    users: Annotated[str, typer.Option(help="numbers of concurrent users, with commas")] = "1,16",
    requests_per_user: Annotated[int, typer.Option(min=1)] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of each answer")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="lengthen prompts to about this many tokens")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="measurements; the fastest one counts")] = 3,
    engine_only: Annotated[bool, typer.Option("--engine-only", help="call the engine directly, without HTTP")] = False,
    nf4: Annotated[bool, typer.Option("--nf4", help="use a 4-bit language model; implies --engine-only")] = False,
    device: Annotated[str, _DEVICE] = "auto",
    json_file: Annotated[Optional[Path], _JSON] = None,  # noqa: UP045
) -> None:
    """Measure tokens per second, time to the first token and time per token, for one user and for many."""
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from babydoctor.bench.gpu_report import serve_record, write_record
    from babydoctor.bench.serve import run_bench
    from babydoctor.bench.serve_figures import parse_users
    from babydoctor.engine.settings import parse_overrides
    from babydoctor.plan.hardware import choose_device
    from babydoctor.runtime import hide_saving_progress, prepare_bench, prepare_engine

    numbers = parse_users(users)
    prepare_bench()
    hide_saving_progress()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="babydoctor-bench-") as folder, console.status("starting") as status:
        report = run_bench(
            preset,
            Path(folder),
            users=numbers,
            requests_per_user=requests_per_user,
            max_new_tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            rounds=rounds,
            engine_only=engine_only,
            nf4=nf4,
            engine=parse_overrides(overrides or []),
            on_engine_start=prepare_engine,
            device=choose_device(device),
            on_event=status.update,
        )
    if json_file is not None:
        for row in report.figures:
            write_record(json_file, "serve", serve_record(report, row))
    heads = ("users", "tok/s", "req/s", "first token p50", "p95 [s]", "per token p50", "p95 [ms]", "decode tok/s")
    table = Table(*heads, "of the bandwidth limit", title=None, box=None)
    for row in report.figures:
        table.add_row(
            str(row.num_users),
            _rate(row.tokens_per_s),
            f"{row.requests_per_s:.2f}",
            f"{row.first_token_p50_s:.3f}",
            f"{row.first_token_p95_s:.3f}",
            f"{row.per_token_p50_s * 1e3:.1f}",
            f"{row.per_token_p95_s * 1e3:.1f}",
            _rate(row.decode_tokens_per_s),
            f"{report.share_of_ceiling(row):.0%}",
        )
    console.print(f"{report.preset}, {report.through}, {report.device}; {max_new_tokens} new tokens per answer")
    console.print(table)
    console.print(
        f"peak memory {report.peak_bytes / 2**20:.0f} MiB; bf16 matmul {report.matmul_flops_per_s / 1e12:.2f} TFLOP/s, "
        f"memory {report.memory_bytes_per_s / 1e9:.1f} GB/s; a decoding step reads at least "
        f"{report.decode_cost.weight_bytes / 1e6:.0f} MB of weights"
    )


def _rate(per_s: float) -> str:
    """A rate with a decimal if it is small."""
    return f"{per_s:.{1 if per_s < 20 else 0}f}"


def ranks(
    steps: Annotated[int, typer.Option(min=1, help="measured steps of each strategy, after two of warm-up")] = 8,
    update: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="write the table between its markers in this Markdown file"),
    ] = None,
) -> None:
    """Compare losses, memory and time of DDP, FSDP2, ZeRO-2 and ZeRO-3 on two CPU ranks with one process."""
    from babydoctor.bench.ranks import bench_ranks

    print_table(lambda: bench_ranks(steps), "strategies on two ranks", update)


def gpu(
    minutes: Annotated[float, typer.Option(min=0.1, help="stop after this time, even if checks are left")] = 8,
    out: Annotated[Path, typer.Option(help="folder for gpu-report.json and gpu-report.md")] = Path(),
    preset: Annotated[Literal["mini", "7b"], typer.Option(help="mini rehearses everything on a CPU")] = "7b",
    device: Annotated[str, _DEVICE] = "auto",
) -> None:
    """Check every CUDA path against the CPU and measure training and serving, most important first."""
    from babydoctor.bench.gpu_check import run_gpu_check
    from babydoctor.plan.hardware import choose_device

    if not run_gpu_check(out, minutes=minutes, preset=preset, device=choose_device(device)):
        raise typer.Exit(1)


def report(
    file: Annotated[Path, typer.Argument(help="gpu-report.json")],
    documents: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--into", help="documents with the markers; default: README.md and babydoctor/bench/README.md"),
    ] = None,
) -> None:
    """Write the figures of a GPU report between the markers in the README and the bench guide."""
    from babydoctor.bench.gpu_report import fill_documents

    for document in fill_documents(file, documents or [Path("README.md"), Path("babydoctor/bench/README.md")]):
        print(f"{document}: figures updated")


def rehearse(
    size: Annotated[
        Literal["golden", "wide", "7b"], typer.Option(help="tiny, full hidden sizes with two layers, or 7B")
    ] = "golden",
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="STEP,...", help="run only these steps again, in the folder of --keep"),
    ] = None,
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder for all files, which are kept; default: a temporary folder"),
    ] = None,
    guide: Annotated[bool, typer.Option("--guide", help="write the table into babydoctor/bench/README.md")] = False,
) -> None:
    """Run the shipped stages and all other commands on random weights in the published layouts; exit 1 on a fault."""
    from rich.console import Console

    from babydoctor.bench.rehearse.program import rehearse as run_rehearsal

    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if not run_rehearsal(size, only=names, keep=keep, guide=guide, console=console):
        raise typer.Exit(1)


def _gib(text: str | float) -> float:
    """A size such as ``22.5GiB`` or ``22.5`` in GiB."""
    number = str(text).removesuffix("GiB").strip()
    try:
        size = float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 22.5GiB") from None
    if not 0 <= size < float("inf"):
        raise typer.BadParameter(f"{text!r} is not a size of memory; write for example 22.5GiB, or 0 for all of it")
    return size
