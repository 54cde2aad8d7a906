"""``babydoctor plan CONFIG``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(plan)


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the stage, for example configs/radiology.yaml")],
    overrides: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the file's")  # noqa: UP045
    ] = None,
    gpu: Annotated[str, typer.Option(help="a10, a100-40, a100-80, l4, 4090, a6000, l40s, h100, h200 or cpu")] = "a10",
    utilization: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--utilization", "--mfu", min=0.01, max=1.0, help="share of the matrix peak; default: 0.5 (assumed)"
        ),
    ] = None,
    options: Annotated[
        bool, typer.Option("--options", help="compare base precision and recomputation: memory and hours")
    ] = False,
    num_gpus: Annotated[int, typer.Option(min=1, help="GPUs that share each step's samples")] = 1,
    strategy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="ddp, fsdp, zero2 or zero3: also prints the prediction for 1, 4, 8 and 64 GPUs"),
    ] = None,
    update: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="with --options or --strategy: write the table between its markers in this file"
        ),
    ] = None,
    figure: Annotated[Optional[Path], typer.Option(help="draw the memory as a stacked bar, PNG or SVG")] = None,  # noqa: UP045
) -> None:
    """Estimate memory by part, operations and hours of a stage before it starts. Exit status 2 if it cannot fit."""
    from babydoctor.config import load_config
    from babydoctor.markers import write_section
    from babydoctor.plan.hardware import ASSUMED_UTILIZATION, find_hardware
    from babydoctor.plan.lengths import find_statistics
    from babydoctor.plan.model import base_models, describe_model
    from babydoctor.plan.options import cheapest, list_options
    from babydoctor.plan.plan import check_fits
    from babydoctor.plan.ranks import GPU_COUNTS, format_ranks, plan_ranks
    from babydoctor.plan.report import draw_plan, format_options, format_plan, update_options
    from babydoctor.plan.template import check_base_template
    from babydoctor.schema import UserError

    if update is not None and not (options or strategy):
        raise UserError("--update writes the table of --options or --strategy; add one of them")
    settings, hardware = load_config(config, overrides or []), find_hardware(gpu)
    share = utilization or ASSUMED_UTILIZATION
    model, base = describe_model(settings), base_models(settings)[0]
    if note := check_base_template(settings.data.template, base):
        print(f"note: {note}")
    statistics = find_statistics(settings.data, base, model.shape.num_patches)
    if options:
        found = list_options(settings, hardware, statistics, share)
        table = format_options(settings.name, hardware.name, found)
        print(table)
        best = cheapest(found)
        if best is not None:
            print(f"\nfewest hours: {best.overrides}")
        if update is not None:
            update_options(update, settings.name, hardware.name, table)
            print(f"updated: {update}")
        return
    plan_stage = partial(plan_ranks, settings, hardware, statistics=statistics, model=model, utilization=share)
    plan_on = partial(plan_stage, strategy=strategy or "ddp")
    result = plan_on(num_ranks=num_gpus).plan
    print(format_plan(result))
    if strategy is not None or num_gpus > 1:
        counts = sorted({count for count in (*GPU_COUNTS, num_gpus) if count <= settings.train.batch_size})
        table = format_ranks([plan_on(num_ranks=count) for count in counts])
        print(f"\n{table}")
        if update is not None:
            write_section(update, f"plan ranks {settings.name} {hardware.name} {strategy}", table)
            print(f"updated: {update}")
    if figure is not None:
        draw_plan(result, figure)
        print(f"figure: {figure}")
    check_fits(settings, result)
