"""Sizes and weights of a stage's model, counted without loading it.

The model is built on the meta device (shapes without memory), so planning 7B takes seconds and megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from babydoctor.config import RunConfig
from babydoctor.model.families import build_tower, load_language_config, load_vision_config
from babydoctor.model.known_sizes import LANGUAGE_MODELS, VISION_TOWERS
from babydoctor.model.language_model import build_language_model, is_decoder_linear
from babydoctor.model.lora import add_lora
from babydoctor.model.run_dir import read_manifest, resolve
from babydoctor.model.vision import build_projector, num_patches
from babydoctor.plan.costs import Architecture

LLAMA_2_7B_ID = "meta-llama/Llama-2-7b-chat-hf"
CLIP_L_ID = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Model:
    """Sizes of a model and the bytes of its weights by part."""

    shape: Architecture
    weights: dict[str, int]
    trainable: int
    """Number of trained parameters."""
    dequantized_bytes: int
    """Size in float of the weights stored in 4 bits, which each pass dequantizes; 0 without quantization."""
    note: str = ""


def describe_model(config: RunConfig, configs: tuple[Any, Any] | None = None) -> Model:
    """Sizes and weights of a stage's model, counted on the meta device.

    Args:
        configs: transformers' configurations of language model and tower; None: as the stage names them.

    Raises:
        UserError: the base models are neither on this disk nor known by name.
    """
    language, vision, note = (*configs, "") if configs else _base_configs(config)
    dtype = getattr(torch, config.model.dtype)
    element = dtype.itemsize
    language_model = build_language_model(language, dtype)
    linears = {name: m for name, m in language_model.named_modules() if is_decoder_linear(name, m)}
    in_linears = sum(m.weight.numel() for m in linears.values())
    in_all = sum(p.numel() for p in language_model.parameters())
    is_4bit = config.model.quantization == "nf4"
    weights = {
        "decoder layers " + ("(NF4)" if is_4bit else f"({config.model.dtype})"): (
            nf4_bytes(in_linears, len(linears), config.model.double_quantization) if is_4bit else in_linears * element
        ),
        "embeddings, norms, output layer": (in_all - in_linears) * element,
    }
    in_lora = 0
    if config.lora is not None:
        with torch.device("meta"):
            add_lora(language_model, config.lora)
        in_lora = sum(p.numel() for name, p in language_model.named_parameters() if "lora_" in name)
    with torch.device("meta"):
        tower = build_tower(vision, dtype)
        projector = build_projector(_projector_kind(config), vision.hidden_size, language.hidden_size)
    weights["vision tower"] = sum(p.numel() for p in tower.parameters()) * element
    in_projector = sum(p.numel() for p in projector.parameters())
    trains_projector = "projector" in config.trainable
    weights["projector"] = in_projector * (4 if trains_projector else element)
    if in_lora:
        weights["LoRA (float32)"] = in_lora * 4
    shape = _architecture(config, language, vision, in_projector)
    trainable = in_lora + (in_projector if trains_projector else 0)
    return Model(shape, weights, trainable, in_linears * element if is_4bit else 0, note)


def nf4_bytes(numel: int, num_layers: int, double: bool) -> int:
    """Bytes of 4-bit weights: half a byte each, and a scale for every block of 64.

    Scales are float32. With double quantization they take one byte each and one float32 per 256 of them, and each
    linear also holds a table of 256 float32 and an offset. Every linear has the 16 float32 of the NF4 code.
    """
    blocks = numel / 64
    scales = blocks + blocks / 256 * 4 + num_layers * (256 * 4 + 4) if double else blocks * 4
    return round(numel / 2 + scales + num_layers * 16 * 4)


def _projector_kind(config: RunConfig) -> str:
    if config.init_from is not None and (Path(config.init_from) / "manifest.json").is_file():
        return read_manifest(config.init_from).projector
    return config.model.projector


def _base_configs(config: RunConfig) -> tuple[Any, Any, str]:
    """Configurations of language model and tower, and a note if one had to be assumed."""
    language, vision, note = base_models(config)
    return _language_config(language), _vision_config(vision), note


def base_models(config: RunConfig) -> tuple[str, str, str]:
    """Folder or hub id of language model and tower, and a note if one had to be assumed."""
    language, vision, note = config.model.language_model, config.model.vision_tower, ""
    if config.init_from is not None:
        start = Path(config.init_from)
        if (start / "manifest.json").is_file():
            manifest = read_manifest(start)
            language = resolve(start, manifest.language_model)
            vision = resolve(start, manifest.vision_tower)
        elif language is None or vision is None:
            note = f"init_from={config.init_from} does not exist yet: planned for {LLAMA_2_7B_ID} and {CLIP_L_ID}"
            language, vision = language or LLAMA_2_7B_ID, vision or CLIP_L_ID
    assert language is not None and vision is not None
    return language, vision, note


def _language_config(reference: str) -> Any:
    from transformers import AutoConfig

    if not Path(reference).is_dir():
        for name, sizes in LANGUAGE_MODELS.items():
            if reference.startswith(name):
                return AutoConfig.for_model(**{"model_type": "llama", **sizes})
    return load_language_config(reference)


def _vision_config(reference: str) -> Any:
    from transformers import AutoConfig

    if not Path(reference).is_dir() and reference in VISION_TOWERS:
        return AutoConfig.for_model(**{"model_type": "clip_vision_model", **VISION_TOWERS[reference]})
    return load_vision_config(reference)


def _architecture(config: RunConfig, language: Any, vision: Any, in_projector: int) -> Architecture:
    head_dim = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    lora = config.lora
    return Architecture(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        query_size=language.num_attention_heads * head_dim,
        kv_size=language.num_key_value_heads * head_dim,
        intermediate_size=language.intermediate_size,
        num_heads=language.num_attention_heads,
        vocab_size=language.vocab_size,
        vision_hidden_size=vision.hidden_size,
        vision_intermediate_size=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers + 1 + config.model.vision_layer,
        num_patches=num_patches(vision),
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        projector_parameters=in_projector,
        dtype_bytes=getattr(torch, config.model.dtype).itemsize,
        is_4bit=config.model.quantization == "nf4",
        lora_rank=lora.r if lora else 0,
        lora_dropout=bool(lora and lora.dropout),
        lora_modules=frozenset(lora.target_modules) if lora else frozenset(),
        trains_projector="projector" in config.trainable,
        has_head_norms=language.model_type == "qwen3",
    )
