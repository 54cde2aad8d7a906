"""Base models with random weights: a LLaMA with a tokenizer, and a CLIP vision tower with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SIZE, PATCH_SIZE = 28, 14
"""Four patches per image."""


def write_base_models(
    folder: Path,
    *,
    llama: dict[str, Any],
    clip: dict[str, Any],
    text: str,
    vocab_size: int,
    dtype: str = "float32",
) -> Path:
    """Write ``folder/llama`` and ``folder/clip``, and return the folder.

    Args:
        llama, clip: keys of ``LlamaConfig`` and ``CLIPVisionConfig``. The vocabulary and the image are set here.
        text: what the tokenizer's merges are learned from.
        vocab_size: largest number of tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(LlamaConfig(**llama | {"vocab_size": len(fast)}))
    language_model.to(getattr(torch, dtype)).save_pretrained(folder / "llama")
    tower = CLIPVisionModel(CLIPVisionConfig(**clip | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}))
    tower.to(getattr(torch, dtype)).save_pretrained(folder / "clip")
    processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor.save_pretrained(folder / "clip")
    return folder
