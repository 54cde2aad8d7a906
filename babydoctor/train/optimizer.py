"""The optimizers (torch's AdamW and bitsandbytes' paged 8-bit AdamW) and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from babydoctor.config import TrainConfig
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.nf4 import import_bitsandbytes


def build_optimizer(model: BabyDoctor, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. The projector has its own learning rate if the configuration sets one.

    Each group keeps its peak rate in ``initial_lr``, which ``set_learning_rate`` multiplies by the schedule.
    """
    projector_rate = config.projector_learning_rate or config.learning_rate
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.trainable_parameters().items():
        rate = projector_rate if name.startswith("projector.") else config.learning_rate
        by_rate.setdefault(rate, []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": params, "lr": rate, "initial_lr": rate} for rate, params in by_rate.items()
    ]
    if config.optimizer == "paged_adamw_8bit":
        optimizers = import_bitsandbytes().optim
        # On the CPU there is nothing to page: the paged class would only add a warning.
        on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
        adamw_8bit = optimizers.AdamW8bit if on_cpu else optimizers.PagedAdamW8bit
        return adamw_8bit(groups, betas=config.betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to ``factor`` times its peak rate. Return the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float, schedule: str) -> float:
    """The factor, 0 to 1, that multiplies the peak learning rate in step ``step``, counted from 0.

    Linear warm-up over ``ceil(warmup_ratio * total_steps)`` steps, then ``cosine`` or ``linear`` to 0, or
    ``constant``. Equal to the schedules of transformers, which LLaVA uses.
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


def is_due(every: int, step: int, total_steps: int) -> bool:
    """True every ``every`` steps (never for 0) and on the last step."""
    return step == total_steps or (every > 0 and step % every == 0)
