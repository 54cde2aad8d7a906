"""The real 7B stages build on meta weights, and the tiny stages have the same keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from babydoctor.config import changed_settings, load_config
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.language_model import build_language_model
from babydoctor.model.lora import add_lora
from babydoctor.model.vision import build_projector

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("align", "instruct", "radiology")

# As in their config.json on the hub: meta-llama/Llama-2-7b-chat-hf and openai/clip-vit-large-patch14.
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
CLIP_L_14 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    projection_dim=768,
)
PROJECTOR = 1024 * 4096 + 4096
LORA_R128 = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


@pytest.mark.parametrize(("stage", "trained"), [("align", 0), ("instruct", LORA_R128), ("radiology", LORA_R128)])
def test_7b_builds_on_meta(stage: str, trained: int) -> None:
    config = load_config(CONFIGS / f"{stage}.yaml")
    language_model = build_language_model(LLAMA_2_7B, getattr(torch, config.model.dtype))
    with torch.device("meta"):
        vision = CLIPVisionModel(CLIP_L_14).requires_grad_(False)
        projector = build_projector(config.model.projector, 1024, 4096)
        if config.lora is not None:
            add_lora(language_model, config.lora)
    model = BabyDoctor(vision, projector, language_model)
    assert sum(p.numel() for p in language_model.parameters() if not p.requires_grad) == 6_738_415_616
    assert model.num_patches == 256
    assert sum(p.numel() for p in model.trainable_parameters().values()) == PROJECTOR + trained
    assert all(p.device.type == "meta" for p in model.parameters())


def test_hyperparameters_are_llavas() -> None:
    align, instruct, radiology = (load_config(CONFIGS / f"{stage}.yaml") for stage in STAGES)
    assert align.train.learning_rate == 2e-3 and align.lora is None and align.data.template == "plain"
    assert instruct.lora is not None and (instruct.lora.r, instruct.lora.alpha) == (128, 256)
    assert instruct.train.learning_rate == 2e-4
    assert radiology.model.quantization == "nf4" and radiology.model.double_quantization
    assert radiology.data.image_mode == "pad"
    for config in (align, instruct, radiology):
        assert (config.train.schedule, config.train.warmup_ratio, config.train.epochs) == ("cosine", 0.03, 1)
        assert config.model.dtype == "bfloat16"


@pytest.mark.parametrize("stage", STAGES)
def test_tiny_stages_set_the_same_sections(stage: str) -> None:
    real, tiny = (yaml.safe_load((folder / f"{stage}.yaml").read_text()) for folder in (CONFIGS, CONFIGS / "tiny"))
    assert real.keys() - {"model"} == tiny.keys() - {"model", "tracking"}
    load_config(CONFIGS / "tiny" / f"{stage}.yaml")


@pytest.mark.parametrize("stage", STAGES)
def test_larger_cards_keep_the_hyperparameters(stage: str) -> None:
    shipped, large = (load_config(folder / f"{stage}.yaml") for folder in (CONFIGS, CONFIGS / "48gb"))
    changed = set(changed_settings(shipped, large))
    assert changed <= {"train.gradient_checkpointing", "train.micro_batch_tokens"} and changed
