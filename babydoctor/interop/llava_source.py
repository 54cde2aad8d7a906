"""Recognize a checkpoint of the original LLaVA code: its layout, and the models that it is based on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from babydoctor.imaging.preprocess import ImageMode
from babydoctor.model.vision import PROJECTOR_KINDS
from babydoctor.model.weights import local_directory
from babydoctor.schema import UserError

Layout = Literal["projector", "lora", "merged"]

_FAMILIES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
"""The original code's ``model_type`` -> the language model's."""

_TEMPLATES = {"llama": "llava_llama_2", "mistral": "mistral_instruct", "qwen2": "chatml"}
"""The template that the original code uses for a language model, unless it was trained with another."""


@dataclass(frozen=True)
class Source:
    """A checkpoint of the original code: directory, layout, configuration, and the models that it is based on."""

    directory: Path
    layout: Layout
    config: dict[str, Any]
    language_model: str
    vision_tower: str

    @property
    def family(self) -> str:
        """``model_type`` of the language model."""
        return _FAMILIES[self.config["model_type"]]

    @property
    def template(self) -> str:
        """The conversation template that it was most likely trained with; the checkpoint does not record it."""
        return _TEMPLATES[_FAMILIES[self.config["model_type"]]]

    @property
    def projector_kind(self) -> Any:
        return self.config.get("mm_projector_type", "linear")

    @property
    def vision_layer(self) -> int:
        return int(self.config.get("mm_vision_select_layer", -2))

    @property
    def image_mode(self) -> ImageMode:
        return "pad" if self.config.get("image_aspect_ratio") == "pad" else "square"


def open_source(source: str | Path, base: str | None, vision_tower: str | None) -> Source:
    """Recognize the layout of a checkpoint and find its language model and vision tower.

    Raises:
        UserError: it is not a LLaVA checkpoint, or its architecture is not supported.
    """
    directory = local_directory(source)
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; give the folder of a LLaVA checkpoint")
    config = json.loads(path.read_text(encoding="utf-8"))
    _check_architecture(config, path)
    layout = _layout(directory)
    if layout == "merged":
        language_model = "./language_model"
    else:
        named = base or config.get("_name_or_path") or _adapter_base(directory)
        if not named:
            raise UserError(f"{path} does not name its language model; give it with --base")
        language_model = _locate(named, None if base else directory, "--base")
    tower = vision_tower or config.get("mm_vision_tower")
    if not tower:
        raise UserError(f"{path} names no mm_vision_tower; give it with --vision-tower")
    return Source(
        directory, layout, config, language_model, _locate(tower, None if vision_tower else directory, "--vision-tower")
    )


def _layout(directory: Path) -> Layout:
    if (directory / "adapter_config.json").is_file():
        return "lora"
    if any(directory.glob("model*.safetensors")) or any(directory.glob("pytorch_model*.bin")):
        return "merged"
    if (directory / "mm_projector.bin").is_file():
        return "projector"
    raise UserError(
        f"{directory} is in none of LLaVA's layouts: it holds no mm_projector.bin, adapter_config.json, "
        "model*.safetensors or pytorch_model*.bin"
    )


def _check_architecture(config: dict[str, Any], path: Path) -> None:
    """Refuse checkpoints that would load but give wrong answers."""
    kind = config.get("model_type")
    if "text_config" in config:
        raise UserError(
            f"{path} is transformers' own Llava format; import reads the original code's (model_type llava_llama)"
        )
    if kind not in _FAMILIES or "mm_vision_tower" not in config:
        raise UserError(
            f"{path}: model_type={kind!r} cannot be read; import takes LLaVA on LLaMA, Mistral and Qwen2 (model_type "
            f"{', '.join(_FAMILIES)}) with its mm_vision_tower"
        )
    for key, allowed in (
        ("mm_projector_type", PROJECTOR_KINDS),
        ("mm_vision_select_feature", ("patch",)),
        ("mm_patch_merge_type", ("flat",)),
        ("image_aspect_ratio", ("square", "pad", None)),
        ("mm_use_im_start_end", (False,)),
        ("attention_bias", (False,)),
    ):
        if config.get(key, allowed[0]) not in allowed:
            choices = ", ".join(repr(value) for value in allowed if value is not None)
            raise UserError(f"{path}: {key}={config[key]!r} is not supported; only {choices}")


def _adapter_base(directory: Path) -> str | None:
    path = directory / "adapter_config.json"
    return json.loads(path.read_text()).get("base_model_name_or_path") if path.is_file() else None


def _locate(named: str, relative_to: Path | None, option: str) -> str:
    """The full path of a directory, or a hub id unchanged; a path in a configuration is relative to its folder."""
    for path in (relative_to / named if relative_to else Path(named), Path(named)):
        if path.is_dir():
            return str(path.resolve())
    if named.startswith((".", "/", "~")) or named.count("/") > 1:
        raise UserError(f"the directory {named!r} does not exist; give its path with {option}")
    return named
