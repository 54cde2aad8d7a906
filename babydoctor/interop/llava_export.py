"""``babydoctor export --format llava``: write a merged directory that the original LLaVA code loads.

The original code chooses the conversation template by the name of the directory.

Source: LLaVA release 1.2, ``llava/model/builder.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from babydoctor.interop.llava_import import PROJECTOR_PREFIX, TOWER_PREFIX
from babydoctor.interop.plain import PlainRun
from babydoctor.model.families import DECODERS, TOWERS, has_class_token
from babydoctor.model.weights import ShardWriter
from babydoctor.schema import UserError

_NAME_HINTS = {
    "llava_llama_2": "llava-llama-2",
    "llama_2": "llava-llama-2",
    "v1": "llava-v1",
    "plain": "llava",
    "mistral": "llava-mistral",
    "mistral_instruct": "llava-mistral",
}
"""The original code chooses a template by these parts of a model's name (``llava/eval/run_llava.py``)."""

_CONVERSATIONS = {"llama_3": "llava_llama_3", "chatml": "qwen_1_5"}
"""Templates that only LLaVA's successor, LLaVA-NeXT, has, and its names for them (``--conv-mode``)."""

_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""The original's ``model_type`` and class for a language model."""


def export_llava(run: PlainRun, out: Path, dtype: torch.dtype) -> list[str]:
    """Write the directory with the tower inside and one weight in memory at a time.

    Returns:
        Lines for the user about how to use it.

    Raises:
        UserError: the original code has no class for the language model.
    """
    model_type = _model_type(run)
    shards = ShardWriter(out)
    for name, weight in run.language_weights("Writing the language model"):
        shards.write(name, weight.to(dtype))
    for name, weight in run.projector_weights().items():
        shards.write(PROJECTOR_PREFIX + name, weight.to(dtype))
    for name, weight in run.tower_weights():
        shards.write(f"{TOWER_PREFIX}vision_model.{name}", weight.to(dtype))
    shards.close()
    _write_tower(run, out / "vision_tower")
    _write_config(run, out, dtype, model_type)
    _write_tokenizer(run, out)
    return [
        "config.json names the tower as ./vision_tower: run the original code in this directory, or set "
        "mm_vision_tower to openai/clip-vit-large-patch14 or to the path of the tower.",
        *_template_notes(run.manifest.template, model_type),
    ]


def _template_notes(template: str, model_type: str) -> Iterator[str]:
    """How the directory must be named: the original code chooses the model's class and the template by that."""
    if template in _CONVERSATIONS:
        yield (
            f"The original code (LLaVA 1.2) has no template {template!r}. LLaVA-NeXT has it: pass --conv-mode "
            f"{_CONVERSATIONS[template]}."
        )
        return
    if model_type == "mistral" and not template.startswith("mistral"):
        yield (
            "The original code chooses the model's class by the directory's name: the name must contain "
            f"'llava-mistral', and not 'lora'. Give it --conv-mode {template}."
        )
        return
    yield (
        f"The original code chooses the template by the directory's name: the name must contain "
        f"{_NAME_HINTS[template]!r}, and not 'lora'."
    )
    if template == "mistral":
        yield (
            "Its template for Mistral writes a space before </s> and none after it; this run's does not. They agree "
            "up to the first answer."
        )


def _model_type(run: PlainRun) -> str:
    """The original code's family. It loads names with 'mistral' as Mistral, which a LLaMA can be loaded as."""
    family = str(run.language_config.model_type)
    if family not in _CLASSES or not has_class_token(run.vision_config):
        names = DECODERS[family], TOWERS[run.vision_config.model_type]
        raise UserError(
            f"{run.path}: the original LLaVA code has no {names[0]} with a {names[1]} tower; it has LLaMA, Mistral and "
            "Qwen2 with CLIP. Export with --format hf"
        )
    return "mistral" if run.manifest.template.startswith("mistral") else family


def _write_tower(run: PlainRun, out: Path) -> None:
    """The tower as transformers 4 writes it. The original loads it from there, and not from the shards.

    Transformers 5 saves weights without ``vision_model.``. The original's transformers would not find these names and
    would continue with random weights.
    """
    tower = ShardWriter(out)
    for name, weight in run.tower_weights():
        tower.write(f"vision_model.{name}", weight)
    tower.close()
    for file in run.tower_directory.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)


def _write_config(run: PlainRun, out: Path, dtype: torch.dtype, model_type: str) -> None:
    llava_type, architecture = _CLASSES[model_type]
    config = {
        **({"sliding_window": None} if model_type == "mistral" else {}),  # by default transformers 4.37 takes 4096
        **run.language_config_values(),
        "architectures": [architecture],
        "model_type": llava_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": run.manifest.image_mode,
        "mm_hidden_size": run.vision_config.hidden_size,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": run.manifest.projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": run.manifest.vision_layer,
        "mm_vision_tower": "./vision_tower",
        "tokenizer_model_max_length": run.manifest.max_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
    }
    # transformers 4.37 describes rotary embeddings by these two keys, transformers 5 by one.
    rope = config.pop("rope_parameters", None)
    if isinstance(rope, dict):
        config["rope_theta"] = rope.get("rope_theta", 10000.0)
        config["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(run.generation_tokens, indent=2) + "\n")


def _write_tokenizer(run: PlainRun, out: Path) -> None:
    """Copy the base's own files if it has any: the original loads the slow tokenizer from tokenizer.model."""
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for name in names:
        if (run.language_directory / name).is_file():
            shutil.copy2(run.language_directory / name, out)
    if not (out / "tokenizer_config.json").is_file():
        run.tokenizer.save_pretrained(str(out))
