"""Examples to pack, and the loss of a batch of them."""

from __future__ import annotations

import numpy as np
import torch

from babydoctor.data.layout import HostBatch
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import IGNORE_INDEX, Batch, Example


def make_example(length: int, num_images: int = 0, seed: int = 0) -> Example:
    """Image slots (4 each) after the first token, then text of which the second half is supervised."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, 200, length).astype(np.int32)
    image_mask = np.zeros(length, bool)
    image_mask[1 : 1 + 4 * num_images] = True
    labels = np.where(np.arange(length) >= (length + 4 * num_images) // 2, input_ids, IGNORE_INDEX).astype(np.int32)
    return Example(str(seed), input_ids, labels, image_mask, tuple(f"{seed}-{i}" for i in range(num_images)))


def with_prefix(example: Example, text: list[int]) -> Example:
    """The example preceded by tokens that are not supervised."""
    head = np.array(text, np.int32)
    return Example(
        example.id,
        np.concatenate([head, example.input_ids]),
        np.concatenate([np.full(len(head), IGNORE_INDEX, np.int32), example.labels]),
        np.concatenate([np.zeros(len(head), bool), example.image_mask]),
        example.images,
    )


def loss(model: BabyDoctor, batch: Batch) -> torch.Tensor:
    size = model.vision.config.image_size
    pixels = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(hash(i) % 997)) for i in batch.images]
    return model(HostBatch(batch, torch.stack(pixels) if pixels else None).to("cpu"))
