"""Sizes of published models, by the keys of their ``config.json`` on the hub. Free of torch.

They allow planning and benchmarks without a download.
"""

from __future__ import annotations

from typing import Any

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA_2_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
"""Releases 0.1 and 0.2; 0.3 has 768 more tokens."""
LLAMA_3_8B = {**MISTRAL_7B, "model_type": "llama", "vocab_size": 128256}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
QWEN_3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b": LLAMA_2_7B,
    "meta-llama/Llama-2-13b": LLAMA_2_13B,
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": LLAMA_3_8B,
    "mistralai/Mistral-7B": MISTRAL_7B,
    "Qwen/Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen/Qwen3-8B": QWEN_3_8B,
}
"""Sizes by the beginning of a hub id; a LLaMA unless ``model_type`` says otherwise."""

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
"""The vision tower of CLIP ViT-L/14 at 224 px."""

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
VISION_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": CLIP_L,
    "openai/clip-vit-large-patch14-336": {**CLIP_L, "image_size": 336},
    "google/siglip-so400m-patch14-224": {**SIGLIP_SO400M, "image_size": 224},
    "google/siglip-so400m-patch14-384": {**SIGLIP_SO400M, "image_size": 384},
}
"""Sizes by hub id; a CLIP unless ``model_type`` says otherwise."""
