"""Plans as text, as a picture, and as the table of a stage's options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from babydoctor.markers import write_section
from babydoctor.plan.options import Option, cheapest
from babydoctor.plan.plan import Plan

GIB = 2**30


def format_plan(plan: Plan) -> str:
    """The whole plan as text."""
    statistics, flops = plan.statistics, plan.flops
    width = max(len(part) for part in plan.memory)
    total, available = plan.total_bytes, plan.hardware.memory_bytes
    room = "fits" if plan.fits else "DOES NOT FIT"
    per_sample = flops.total / plan.samples_per_step
    prefix = f" and {statistics.num_prefix} shared by all samples, computed once per micro-batch"
    lines = [
        f"{plan.name} on {plan.hardware.name} ({available / GIB:.1f} GiB)",
        *([plan.model.note] if plan.model.note else []),
        "",
        "peak memory of a training step",
        *(f"  {part:<{width}}  {size / GIB:7.2f} GiB" for part, size in plan.memory.items()),
        f"  {'total':<{width}}  {total / GIB:7.2f} GiB of {available / GIB:.1f}: {room}",
        "",
        f"gradient checkpointing    {plan.gradient_checkpointing}",
        f"micro-batch               {plan.micro_batch_tokens:,} tokens; the largest that fits: "
        + (f"{plan.largest_micro_batch:,}" if plan.largest_micro_batch else "none"),
        f"trained parameters        {plan.model.trainable / 1e6:,.1f} million",
        "",
        f"samples                   {statistics.num_samples:,}  ({statistics.source})",
        f"tokens per sample         {statistics.num_tokens:.0f}, of which {statistics.num_supervised:.0f} carry a loss"
        + (prefix if statistics.num_prefix else ""),
        f"steps                     {plan.num_steps:,}",
        f"operations per sample     {per_sample / 1e12:.3g} TFLOP",
        *(f"  {part:<24}{100 * share:5.1f} %" for part, share in _shares(plan)),
        f"seconds per step          {plan.seconds_per_step:.3g}",
        f"time for the whole set    {_duration(plan.hours)}",
        f"assumed utilization       {plan.utilization:.0%} of the peak of {plan.hardware.flops_per_s / 1e12:.3g} "
        f"TFLOP/s, not measured; that is {plan.mfu:.0%} MFU, which does not count recomputation",
    ]
    return "\n".join(lines)


def format_short(plan: Plan) -> str:
    """One line for the start of a run."""
    return (
        f"plan: {plan.total_bytes / GIB:.2f} of {plan.hardware.memory_bytes / GIB:.1f} GiB on {plan.hardware.name}, "
        f"{plan.statistics.num_tokens:.0f} tokens per sample, micro-batches of {plan.micro_batch_tokens:,}, "
        f"gradient checkpointing {plan.gradient_checkpointing}, {plan.num_steps:,} steps"
    )


def format_options(stage: str, gpu: str, options: Sequence[Option]) -> str:
    """A Markdown table of a stage's options; the one with the fewest hours is in bold."""
    best = cheapest(options)
    plans = [option.plan for option in options if option.plan is not None]
    if not plans:
        return f"{stage} does not fit {gpu} with any base and any recomputation."
    device, utilization = plans[0].hardware, plans[0].utilization
    lines = [
        f"{stage} on {gpu} ({device.memory_bytes / GIB:.1f} GiB, {device.flops_per_s / 1e12:.0f} TFLOP/s); "
        f"hours at an assumed utilization of {utilization:.0%}:",
        "",
        "| `model.quantization` | `train.gradient_checkpointing` | `train.micro_batch_tokens` | memory, GiB | hours |",
        "|---|---|---|---|---|",
    ]
    for option in options:
        cells = [option.quantization, option.gradient_checkpointing]
        if option.plan is None:
            cells += ["-", "does not fit", "-"]
        else:
            plan = option.plan
            cells += [f"{plan.micro_batch_tokens:,}", f"{plan.total_bytes / GIB:.1f}", f"{plan.hours:.1f}"]
        lines.append("| " + " | ".join(f"**{cell}**" if option is best else cell for cell in cells) + " |")
    return "\n".join(lines)


def update_options(path: Path, stage: str, gpu: str, table: str) -> None:
    """Replace the table of this stage and GPU between its markers in a Markdown file.

    Raises:
        UserError: the file or its markers do not exist.
    """
    write_section(path, f"plan options {stage} {gpu}", table)


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw the memory as a stacked bar against the device's."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.add_subplot()
    left = 0.0
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for index, (part, size) in enumerate(plan.memory.items()):
        axes.barh([0], [size / GIB], left=left, color=colors[index % len(colors)], label=f"{part}: {size / GIB:.2f}")
        left += size / GIB
    limit = plan.hardware.memory_bytes / GIB
    axes.axvline(limit, color="black", linestyle="--", linewidth=1.2)
    axes.text(limit, 0.48, f" {plan.hardware.name}: {limit:.1f} GiB", va="bottom", ha="right", fontsize=8)
    axes.set(yticks=[], xlabel="GiB", xlim=(0, max(limit, left) * 1.03), ylim=(-0.45, 0.62))
    axes.set_title(
        f"{plan.name}: {left:.1f} GiB at the peak, micro-batches of {plan.micro_batch_tokens:,} tokens, "
        f"gradient checkpointing {plan.gradient_checkpointing}",
        fontsize=9,
    )
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def _shares(plan: Plan) -> list[tuple[str, float]]:
    flops = plan.flops
    parts = {
        "vision and projector": flops.vision,
        "language model forward": flops.base_forward,
        "language model backward": flops.base_backward,
        "LoRA": flops.lora,
        "attention": flops.attention,
        "logits": flops.logits,
        "recomputation": flops.recomputed,
    }
    return [(part, value / flops.total) for part, value in parts.items() if value]


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
