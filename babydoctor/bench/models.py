"""Models of known sizes with random weights. Speed and memory do not depend on the values of weights."""

from __future__ import annotations

from typing import Any

import torch

from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.known_sizes import CLIP_L, LLAMA_2_7B
from babydoctor.model.language_model import build_language_model, finish_language_model, place_weight
from babydoctor.model.nf4 import Quantization
from babydoctor.model.vision import build_projector

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "language": {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 32000,
        },
        "vision": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 224,
            "patch_size": 14,
        },
    },
    "mini": {
        "language": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "vocab_size": 32000,
        },
        "vision": {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
        },
    },
    "7b": {"language": LLAMA_2_7B, "vision": CLIP_L},
}
"""``tiny`` is for tests, ``mini`` for benchmarks on a CPU; ``7b`` has the sizes of LLaMA-2-7B and CLIP-L. Language
models are LLaMAs unless ``model_type`` says otherwise."""


def build_random_model(
    preset: str, device: str, *, dtype: torch.dtype = torch.bfloat16, quantization: Quantization | None = None
) -> BabyDoctor:
    """Build a frozen model of the preset's sizes, weight by weight on the device, and quantize it if asked."""
    from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    language_config: Any = AutoConfig.for_model(**{"model_type": "llama", **PRESETS[preset]["language"]})
    language_model = build_language_model(language_config, dtype)
    for name, parameter in list(language_model.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(std=0.02)
        place_weight(language_model, name, weight, quantization)
    finish_language_model(language_model, device)
    vision_config: Any = CLIPVisionConfig(**PRESETS[preset]["vision"])
    with torch.device(device):
        vision: Any = CLIPVisionModel._from_config(vision_config, dtype=dtype)
        projector = build_projector("linear", vision_config.hidden_size, language_config.hidden_size)
    projector.to(dtype)
    return BabyDoctor(vision, projector, language_model).eval().requires_grad_(False)
