"""Random small models of every accepted decoder family and of SigLIP, with the features that differ from LLaMA."""

from __future__ import annotations

import copy
from pathlib import Path
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

from babydoctor.config import LoraConfig
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.families import build_causal_lm, build_tower
from babydoctor.model.lora import add_lora, save_lora
from babydoctor.model.run_dir import Manifest, write_manifest
from babydoctor.model.tensor_files import save_tensors
from babydoctor.model.vision import build_projector

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
    """Give biases and norms random values; transformers initializes them with zeros and ones."""
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


def write_run(folder: Path, family: str, tokenizer_from: Path, *, tower: str = "clip", quantized: bool = False) -> Path:
    """``folder/base``, ``folder/tower`` and ``folder/run`` with an MLP projector and a LoRA; returns the run."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, SiglipImageProcessor, SiglipVisionModel

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_from))
    tokenizer.save_pretrained(folder / "base")
    config = copy.deepcopy(LANGUAGE_CONFIGS[family])
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    base = randomize(build_causal_lm(config, torch.float32))
    base.save_pretrained(folder / "base")
    vision: Any
    if tower == "clip":
        vision = CLIPVisionModel(CLIPVisionConfig(**TOWER_SIZES))
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "tower")
    else:
        vision = SiglipVisionModel(SiglipVisionConfig(**TOWER_SIZES))  # with the pooling head, as published
        SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder / "tower")
    randomize(vision).save_pretrained(folder / "tower")
    run = folder / "run"
    projector = build_projector("mlp2x_gelu", TOWER_SIZES["hidden_size"], config.hidden_size)
    run.mkdir()
    save_tensors({name: value.detach() for name, value in projector.named_parameters()}, run / "projector.safetensors")
    add_lora(base, LoraConfig(r=2, alpha=4, dropout=0.0))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_lora(base, run / "adapter", str(folder / "base"))
    image = ImageSettings.from_processor_dir(folder / "tower", "pad")
    manifest = Manifest(
        name="run",  # transformers reads a GGUF by another architecture if its name is a family's
        language_model=str(folder / "base"),
        vision_tower=str(folder / "tower"),
        projector="mlp2x_gelu",
        template="plain",
        image_size=image.size,
        image_mode=image.mode,
        image_mean=image.mean,
        image_std=image.std,
        dtype="float32",
        quantization="nf4" if quantized else "none",
    )
    write_manifest(run, manifest)
    return run
