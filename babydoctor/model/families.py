"""The model families that BabyDoctor accepts: decoders that are LLaMA with small differences, and vision towers.

=========  ==============================================================================
decoder    differs from LLaMA by
=========  ==============================================================================
llama
mistral    a sliding window: a token sees itself and the ``W - 1`` tokens before it
qwen2      biases of the query, key and value projections
qwen3      an RMSNorm of each query and key head before the rotary embedding
=========  ==============================================================================

Source: Mistral 7B (Jiang et al. 2023), Qwen2 (Yang et al. 2024), Qwen3 (Yang et al. 2025), SigLIP (Zhai et al. 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from babydoctor.model.weights import read_model_config
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

LanguageConfig: TypeAlias = "LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config"
LanguageModel: TypeAlias = "LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM"
VisionConfig: TypeAlias = "CLIPVisionConfig | SiglipVisionConfig"
VisionTower: TypeAlias = "CLIPVisionModel | SiglipVisionModel"

DECODERS = {"llama": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""``model_type`` of ``config.json`` -> name."""

TOWERS = {"clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "SigLIP", "siglip_vision_model": "SigLIP"}
"""``model_type`` of ``config.json`` -> name."""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone within the context of the model."""


def load_language_config(path: str | Path) -> LanguageConfig:
    """Read the configuration of a language model.

    Raises:
        UserError: it does not exist, or has another architecture.
    """
    config = read_model_config(path, "language model")
    check_language_config(config, str(path))
    return config


def check_language_config(config: Any, path: str) -> None:
    """Refuse a language model that would be computed differently from transformers.

    Raises:
        UserError: another family, or a variant of one that is not supported.
    """
    if config.model_type not in DECODERS:
        raise UserError(
            f"the language model {path!r} is a {config.model_type!r}; BabyDoctor accepts "
            f"{', '.join(DECODERS.values())} models, for example meta-llama/Llama-2-7b-chat-hf"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if len(layer_types) > 1:
        raise UserError(
            f"the language model {path!r} has a sliding window in some layers only (use_sliding_window=true, "
            f"max_window_layers={getattr(config, 'max_window_layers', None)}); only one window for all layers is "
            "supported. Set use_sliding_window to false in its config.json if it was trained without"
        )
    if config.hidden_act != "silu":
        raise UserError(f"the language model {path!r} has hidden_act={config.hidden_act!r}; only 'silu' is supported")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"the language model {path!r} has rope_type={kind!r} with partial_rotary_factor="
            f"{rope.get('partial_rotary_factor', 1.0)}; supported are {', '.join(ROPE_TYPES)} over whole heads"
        )


def load_vision_config(path: str | Path) -> VisionConfig:
    """Read the configuration of a vision tower, which may be part of a complete CLIP or SigLIP.

    Raises:
        UserError: it does not exist or is of another family.
    """
    config = read_model_config(path, "vision tower")
    if config.model_type not in TOWERS:
        raise UserError(
            f"the vision tower {str(path)!r} is a {config.model_type!r}; BabyDoctor accepts CLIP and SigLIP towers, "
            "for example openai/clip-vit-large-patch14"
        )
    config = getattr(config, "vision_config", config)
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise UserError(f"the vision tower {str(path)!r} has {name}={getattr(config, name)}; it must be one number")
    return config


def has_class_token(config: Any) -> bool:
    """True if the tower puts a class token before the patches, as CLIP does and SigLIP does not."""
    return config.model_type == "clip_vision_model"


def sliding_window(config: Any) -> int | None:
    """How many tokens a token attends to, itself included; None: all before it."""
    if config.model_type == "mistral" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return config.sliding_window
    return None


def build_causal_lm(config: Any, dtype: torch.dtype) -> LanguageModel:
    """transformers' model of a configuration, with its own initial values unless built on the meta device."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def build_tower(config: Any, dtype: torch.dtype) -> VisionTower:
    """transformers' vision tower of a configuration; a SigLIP without its pooling head, which nothing reads."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    if has_class_token(config):
        return CLIPVisionModel._from_config(config, dtype=dtype)
    config.vision_use_head = False
    return SiglipVisionModel._from_config(config, dtype=dtype)
