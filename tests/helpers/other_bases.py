"""Random small models of every accepted decoder family and of SigLIP, with the features that differ from LLaMA."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.families import build_causal_lm, build_tower

WINDOW = 12
"""Shorter than the documents of the tests, and no divisor of a step's rows."""

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LANGUAGE_CONFIGS: dict[str, Any] = {
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "mistral-v0.2": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=0),
    "llama3": LlamaConfig(**SIZES, attention_bias=True),
}
TOWER_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def randomize(model: Any) -> Any:
    """Give biases and norms values that matter; transformers begins with zeros and ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def build_base(family: str, *, tower: str = "clip", dtype: torch.dtype = torch.float32, seed: int = 0) -> BabyDoctor:
    """A frozen model with four patches per image; its tower is ``clip`` or ``siglip``."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(**TOWER_SIZES) if tower == "clip" else SiglipVisionConfig(**TOWER_SIZES)
    language_model = randomize(build_causal_lm(LANGUAGE_CONFIGS[family], torch.float32))
    vision = randomize(build_tower(config, torch.float32))
    projector = torch.nn.Linear(TOWER_SIZES["hidden_size"], SIZES["hidden_size"])
    return BabyDoctor(vision, projector, language_model).to(dtype).eval().requires_grad_(False)
