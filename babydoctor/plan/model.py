"""What a plan needs to know of a stage's model, counted without loading it.

The model is built on the meta device, shapes without memory, so that a 7B plan takes seconds and megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from babydoctor.config import RunConfig
from babydoctor.model.language_model import build_language_model, is_decoder_linear, load_language_config
from babydoctor.model.lora import add_lora
from babydoctor.model.run_dir import read_manifest, resolve
from babydoctor.model.vision import build_projector, num_patches
from babydoctor.plan.costs import Architecture
from babydoctor.schema import UserError

LLAMA_2_7B = "meta-llama/Llama-2-7b-chat-hf"
CLIP_L_14 = "openai/clip-vit-large-patch14"

_KNOWN_LLAMAS: dict[str, dict[str, int]] = {
    "meta-llama/Llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "meta-llama/Llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_KNOWN_CLIPS: dict[str, dict[str, int]] = {
    CLIP_L_14: {**_CLIP_L, "image_size": 224, "patch_size": 14},
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336, "patch_size": 14},
}
"""Sizes of the hub's models, so that a plan needs no download. Source: their config.json."""


@dataclass(frozen=True)
class Model:
    """What the planner needs to know of a model: its sizes and the bytes of its weights by part."""

    shape: Architecture
    weights: dict[str, int]
    trainable: int
    """Number of trained parameters."""
    dequantized_bytes: int
    """Float size of what is stored in 4 bits, written anew in each pass; 0 without quantisation."""
    note: str = ""


def describe_model(config: RunConfig, configs: tuple[Any, Any] | None = None) -> Model:
    """Sizes and weights of a stage's model, counted on the meta device.

    Args:
        configs: transformers' configurations of language model and tower; None: as the stage names them.

    Raises:
        UserError: the base models are neither here nor known by name.
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
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        tower = CLIPVisionModel(vision)
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

    Scales are float32, or with double quantisation one byte each, in blocks of 256 with a float32 scale; then each
    layer also holds a table of 256 float32 and an offset. Every layer has the 16 float32 of the NF4 code.
    """
    blocks = numel / 64
    scales = blocks + blocks / 256 * 4 + num_layers * (256 * 4 + 4) if double else blocks * 4
    return round(numel / 2 + scales + num_layers * 16 * 4)


def _projector_kind(config: RunConfig) -> str:
    if config.init_from is not None and (Path(config.init_from) / "manifest.json").is_file():
        return read_manifest(config.init_from).projector
    return config.model.projector


def _base_configs(config: RunConfig) -> tuple[Any, Any, str]:
    """Configurations of language model and tower, and a note where something had to be assumed."""
    language, vision, note = base_models(config)
    return _llama_config(language), _clip_config(vision), note


def base_models(config: RunConfig) -> tuple[str, str, str]:
    """Where language model and tower are, and a note where something had to be assumed."""
    language, vision, note = config.model.language_model, config.model.vision_tower, ""
    if config.init_from is not None:
        start = Path(config.init_from)
        if (start / "manifest.json").is_file():
            manifest = read_manifest(start)
            language = resolve(start, manifest.language_model)
            vision = resolve(start, manifest.vision_tower)
        elif language is None or vision is None:
            note = f"init_from={config.init_from} is not there yet: planned for {LLAMA_2_7B} and {CLIP_L_14}"
            language, vision = language or LLAMA_2_7B, vision or CLIP_L_14
    assert language is not None and vision is not None
    return language, vision, note


def _llama_config(reference: str) -> Any:
    from transformers import LlamaConfig

    if not Path(reference).is_dir():
        for name, sizes in _KNOWN_LLAMAS.items():
            if reference.startswith(name):
                return LlamaConfig(**sizes)  # type: ignore[arg-type]
    return load_language_config(reference)


def _clip_config(reference: str) -> Any:
    from transformers import AutoConfig, CLIPVisionConfig

    if not Path(reference).is_dir() and reference in _KNOWN_CLIPS:
        return CLIPVisionConfig(**_KNOWN_CLIPS[reference])  # type: ignore[arg-type]
    try:
        config = AutoConfig.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise UserError(f"no vision tower could be read from {reference!r}: {error}") from error
    return getattr(config, "vision_config", config)


def _architecture(config: RunConfig, language: Any, vision: Any, in_projector: int) -> Architecture:
    head_dim = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    lora = config.lora
    return Architecture(
        num_layers=language.num_hidden_layers,
        width=language.hidden_size,
        kv_width=language.num_key_value_heads * head_dim,
        intermediate=language.intermediate_size,
        num_heads=language.num_attention_heads,
        vocabulary=language.vocab_size,
        vision_width=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
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
    )
