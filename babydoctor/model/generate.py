"""Plain batched greedy decoding by transformers, for sample answers and scores. Serving has ``babydoctor.engine``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from babydoctor.data.tokens import encode
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: BabyDoctor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Segment]],
    pixel_values: torch.Tensor | None,
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer prompts greedily; each answer ends at the end-of-sequence token or ``max_new_tokens``.

    Args:
        prompts: rendered by ``conversation.render_prompt``.
        pixel_values: ``[N, 3, S, S]``, the images of all prompts in order.
    """
    examples = [encode(prompt, tokenizer, model.num_patches) for prompt in prompts]
    longest = max(len(example) for example in examples)
    shape = (len(examples), longest)
    input_ids, image_mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    attention_mask = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):  # padded on the left, so that all answers begin at one position
        input_ids[row, -len(example) :] = example.input_ids
        image_mask[row, -len(example) :] = example.image_mask
        attention_mask[row, -len(example) :] = 1
    device = model.device
    features = None if pixel_values is None else model.encode_images(pixel_values.to(device))
    embeds = model.embed(torch.from_numpy(input_ids).to(device), torch.from_numpy(image_mask).to(device), features)
    was_training = model.training
    model.eval()
    language_model: Any = model.language_model
    output = language_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.from_numpy(attention_mask).to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
