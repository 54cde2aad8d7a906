"""A plan in words and as a picture."""

from __future__ import annotations

from pathlib import Path

from babydoctor.plan.plan import Plan

GIB = 2**30


def format_plan(plan: Plan) -> str:
    """The whole plan as text."""
    statistics, flops = plan.statistics, plan.flops
    width = max(len(part) for part in plan.memory)
    total, available = plan.total_bytes, plan.hardware.memory_bytes
    room = "fits" if plan.fits else "DOES NOT FIT"
    per_sample = flops.total / plan.samples_per_step
    lines = [
        f"{plan.name} on {plan.hardware.name} ({available / GIB:.1f} GiB)",
        *([plan.model.note] if plan.model.note else []),
        "",
        "memory at the peak of a step",
        *(f"  {part:<{width}}  {size / GIB:7.2f} GiB" for part, size in plan.memory.items()),
        f"  {'total':<{width}}  {total / GIB:7.2f} GiB of {available / GIB:.1f}: {room}",
        "",
        f"gradient checkpointing    {plan.gradient_checkpointing}",
        f"micro-batch               {plan.micro_batch_tokens:,} positions; the largest that fits: "
        + (f"{plan.largest_micro_batch:,}" if plan.largest_micro_batch else "none"),
        f"trained parameters        {plan.model.trainable / 1e6:,.1f} million",
        "",
        f"samples                   {statistics.num_samples:,}  ({statistics.source})",
        f"positions a sample        {statistics.num_tokens:.0f}, of which {statistics.num_supervised:.0f} supervised"
        + (f" and {statistics.num_prefix} common to all, computed once a micro-batch" if statistics.num_prefix else ""),
        f"steps                     {plan.num_steps:,}",
        f"operations a sample       {per_sample / 1e12:.3g} TFLOP",
        *(f"  {part:<24}{100 * share:5.1f} %" for part, share in _shares(plan)),
        f"a step                    {plan.seconds_per_step:.3g} s",
        f"the whole set             {_duration(plan.hours)}, supposing {plan.utilization:.0%} of the peak of "
        f"{plan.hardware.flops_per_s / 1e12:.3g} TFLOP/s (MFU {plan.mfu:.0%}: recomputation is no use)",
    ]
    return "\n".join(lines)


def format_short(plan: Plan) -> str:
    """One line for the start of a run."""
    return (
        f"plan: {plan.total_bytes / GIB:.2f} of {plan.hardware.memory_bytes / GIB:.1f} GiB on {plan.hardware.name}, "
        f"{plan.statistics.num_tokens:.0f} positions a sample, micro-batches of {plan.micro_batch_tokens:,}, "
        f"gradient checkpointing {plan.gradient_checkpointing}, {plan.num_steps:,} steps"
    )


def draw_plan(plan: Plan, path: Path) -> None:
    """A stacked bar of the memory against the device's."""
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
        f"{plan.name}: {left:.1f} GiB at the peak, micro-batches of {plan.micro_batch_tokens:,} positions, "
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
