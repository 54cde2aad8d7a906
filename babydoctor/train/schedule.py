"""The learning rate over a run. Pure."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """The factor, 0 to 1, for the optimiser step ``step`` (counted from 0).

    Linear warm-up over ``ceil(warmup_ratio * total_steps)`` steps, then ``cosine`` or ``linear`` to 0, or
    ``constant``. Equals transformers' schedules, which LLaVA uses.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1.0 - progress
    assert schedule == "constant", schedule
    return 1.0


def is_due(every: int, step: int, total: int) -> bool:
    """Whether something that comes every so many steps, and at the end, comes after ``step`` steps."""
    return step == total or (every > 0 and step % every == 0)
