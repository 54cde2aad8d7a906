"""The parts of one optimizer step: forward, backward and the sum of gradients over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from babydoctor.config import TrainConfig
from babydoctor.data.layout import HostBatch
from babydoctor.data.loader import StepData
from babydoctor.schema import UserError


def accumulate_gradients(engine: nn.Module, data: StepData, accelerator: Accelerator) -> torch.Tensor:
    """Forward and backward over this rank's micro-batches; the last one sums the gradients over ranks.

    Args:
        engine: a ``BabyDoctor``, or its wrapper from ``accelerator.prepare``.

    Returns:
        The mean loss per supervised token of the whole step over all ranks, a scalar on the device, so that reading it
        later does not delay the step. Every token has the same weight, however the step is split into micro-batches.
    """
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(data.batches):
        accelerator.sync_gradients = index == len(data.batches) - 1
        with contextlib.nullcontext() if accelerator.sync_gradients else accelerator.no_sync(engine):
            loss = forward(engine, batch, accelerator.device) / max(1, data.num_supervised)
            # Every engine averages gradients over ranks. The factor turns the average into a sum.
            accelerator.backward(loss * accelerator.num_processes)
        total += loss.detach()
    return accelerator.reduce(total)


def forward(engine: nn.Module, batch: HostBatch, device: torch.device) -> torch.Tensor:
    """Summed loss of one micro-batch (float32 scalar), computed in the frozen weights' precision."""
    loss: torch.Tensor = engine(batch.to(device))
    return loss


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators (LoRA's dropout) from the step, so that a resumed run draws the same numbers."""
    torch.manual_seed(hash((seed, step, rank)))


@contextlib.contextmanager
def explain_out_of_memory(settings: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory error into a ``UserError`` that names the settings to change.

    Raises:
        UserError: the device ran out of memory in the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"the GPU ran out of memory with train.micro_batch_tokens={settings.micro_batch_tokens} and "
            f"train.gradient_checkpointing={settings.gradient_checkpointing} ({reason}). Continue with --resume and a "
            "smaller train.micro_batch_tokens, or with train.gradient_checkpointing=full"
        ) from error
