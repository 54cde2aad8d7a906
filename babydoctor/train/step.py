"""One optimizer step: forward, backward and the sum of gradients over ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from babydoctor.data.loader import StepData
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import Batch


def accumulate_gradients(model: BabyDoctor, data: StepData, accelerator: Accelerator) -> float:
    """Forward and backward over this rank's micro-batches; gradients are summed over ranks.

    Returns:
        The mean loss per supervised token of the whole step, over all ranks. Each token weighs the same,
        however the step is split into micro-batches.
    """
    total = torch.zeros((), device=accelerator.device)
    for batch, pixels in zip(data.batches, data.pixels, strict=True):
        loss = forward(model, batch, pixels) / max(1, data.num_supervised)
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
    return total.item()


def forward(model: BabyDoctor, batch: Batch, pixels: torch.Tensor | None) -> torch.Tensor:
    """Summed loss of one micro-batch, computed in the frozen weights' precision."""
    device = model.device
    tensors = {
        name: torch.from_numpy(getattr(batch, name)).to(device, non_blocking=True).long()
        for name in ("input_ids", "targets", "position_ids")
    }
    dtype = model.language_model.dtype
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(
            **tensors,
            image_mask=torch.from_numpy(batch.image_mask).to(device, non_blocking=True),
            document_lengths=batch.document_lengths,
            prefix_length=batch.prefix_length,
            pixel_values=None if pixels is None else pixels.to(device, non_blocking=True),
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators (LoRA's dropout) from the step, so that a resumed run draws the same numbers."""
    torch.manual_seed(hash((seed, step, rank)))
