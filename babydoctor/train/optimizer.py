"""The optimisers of a stage: torch's AdamW and bitsandbytes' paged 8-bit AdamW."""

from __future__ import annotations

import torch

from babydoctor.config import TrainConfig
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.nf4 import import_bitsandbytes


def build_optimizer(model: BabyDoctor, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, the projector with a learning rate of its own where one is set.

    Each group keeps its peak rate in ``initial_lr``; the loop multiplies it by the schedule.
    """
    projector_rate = config.projector_learning_rate or config.learning_rate
    by_rate: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.trainable_parameters().items():
        rate = projector_rate if name.startswith("projector.") else config.learning_rate
        by_rate.setdefault(rate, []).append(parameter)
    groups = [{"params": params, "lr": rate, "initial_lr": rate} for rate, params in by_rate.items()]
    if config.optimizer == "paged_adamw_8bit":
        paged = import_bitsandbytes().optim.PagedAdamW8bit
        return paged(groups, betas=config.betas, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group to ``factor`` times its peak rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]
