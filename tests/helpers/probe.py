"""Logits of a whole run at a fixed prompt, to compare two runs by."""

from __future__ import annotations

from typing import Any

import torch

from babydoctor.model.babydoctor import BabyDoctor


@torch.no_grad()
def probe_logits(model: BabyDoctor, num_tokens: int = 48) -> torch.Tensor:
    """Logits ``[T, V]`` (float32) at a fixed pseudo-random prompt with an image."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.language_model.config.vocab_size
    length = model.num_patches + num_tokens
    input_ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    image_mask = torch.zeros(1, length, dtype=torch.bool)
    image_mask[:, 1 : 1 + model.num_patches] = True
    size: Any = model.vision.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=generator)
    embeds = model.embed(input_ids, image_mask, model.encode_images(pixels))
    hidden = model.decode(embeds, torch.arange(length)[None], (length,))
    return model.language_model.lm_head(hidden)[0].float()
