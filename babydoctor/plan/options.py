"""Alternatives to a stage's settings, with the memory and hours of each.

Only settings that do not change LLaVA's recipe are varied: how the frozen base is stored, which layers are recomputed,
and how a step is split into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from babydoctor.config import RunConfig
from babydoctor.plan.hardware import ASSUMED_UTILIZATION, Hardware
from babydoctor.plan.lengths import TokenStatistics
from babydoctor.plan.model import describe_model
from babydoctor.plan.plan import CHECKPOINTING, Plan, build_plan, with_settings

MOST_MICRO_BATCH_TOKENS = 4096
"""Largest micro-batch of an option. Matrix products reach full speed below it, and fewer tokens need less memory."""


@dataclass(frozen=True)
class Option:
    """One combination of settings. ``plan`` is None if not even one sample of data.max_length fits."""

    quantization: str
    gradient_checkpointing: str
    plan: Plan | None

    @property
    def overrides(self) -> str:
        """The settings as ``babydoctor train`` takes them."""
        assert self.plan is not None
        return (
            f"model.quantization={self.quantization} train.gradient_checkpointing={self.gradient_checkpointing} "
            f"train.micro_batch_tokens={self.plan.micro_batch_tokens}"
        )


def list_options(
    config: RunConfig, hardware: Hardware, statistics: TokenStatistics, utilization: float = ASSUMED_UTILIZATION
) -> list[Option]:
    """Every combination of base and recomputation, each with its largest micro-batch up to 4,096 tokens."""
    options = []
    for quantization in ("none", "nf4"):
        base = with_settings(config, "model", quantization=quantization)
        model = describe_model(base)
        for checkpointing in CHECKPOINTING:
            settings = with_settings(base, "train", gradient_checkpointing=checkpointing, micro_batch_tokens="auto")
            plan = build_plan(settings, hardware, statistics=statistics, model=model, utilization=utilization)
            if plan.micro_batch_tokens > MOST_MICRO_BATCH_TOKENS:
                tokens = max(MOST_MICRO_BATCH_TOKENS, config.data.max_length)
                settings = with_settings(settings, "train", micro_batch_tokens=tokens)
                plan = build_plan(settings, hardware, statistics=statistics, model=model, utilization=utilization)
            options.append(Option(quantization, checkpointing, plan if plan.fits else None))
    return options


def cheapest(options: Iterable[Option]) -> Option | None:
    """The option with the fewest hours; None if none fits."""
    fitting = [option for option in options if option.plan is not None]
    return min(fitting, key=lambda option: option.plan.hours if option.plan else 0.0, default=None)
