"""One optimizer step: forward, backward and the sum of gradients over ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from babydoctor.config import TrainConfig
from babydoctor.data.layout import HostBatch
from babydoctor.data.loader import StepData
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import UserError


def accumulate_gradients(model: BabyDoctor, data: StepData, accelerator: Accelerator) -> torch.Tensor:
    """Forward and backward over this rank's micro-batches; gradients are summed over ranks.

    Returns:
        The mean loss per supervised token of the whole step, over all ranks: a scalar on the device, so that nothing
        waits for it here. Each token weighs the same, however the step is split into micro-batches.
    """
    total = torch.zeros((), device=accelerator.device)
    for batch in data.batches:
        loss = forward(model, batch) / max(1, data.num_supervised)
        loss.backward()
        total += loss.detach()
    if accelerator.num_processes > 1:
        gradients = []
        for parameter in model.trainable_parameters().values():
            if parameter.grad is None:  # this rank had no sample with an image, or none at all
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
        torch.distributed.all_reduce(total)
    return total


def forward(model: BabyDoctor, batch: HostBatch) -> torch.Tensor:
    """Summed loss of one micro-batch (float32 scalar), computed in the frozen weights' precision."""
    device, dtype = model.device, model.language_model.dtype
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss: torch.Tensor = model(batch.to(device))
    return loss


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators (LoRA's dropout) from the step, so that a resumed run draws the same numbers."""
    torch.manual_seed(hash((seed, step, rank)))


@contextlib.contextmanager
def explain_out_of_memory(settings: TrainConfig) -> Iterator[None]:
    """Turn an out-of-memory error into one sentence.

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
