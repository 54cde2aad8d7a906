"""``babydoctor import``: create a run directory from a checkpoint of the original LLaVA code.

Such checkpoints are published in four layouts:

====================  =====================================================  ==============================
layout                files                                                  becomes
====================  =====================================================  ==============================
projector on a base   ``mm_projector.bin``                                   projector
LoRA on a base        ``adapter_model.*`` and ``non_lora_trainables.bin``    projector, ``adapter/``
merged, tower inside  ``model*.safetensors`` with ``model.vision_tower.*``   projector, ``language_model/``,
                                                                             ``vision_tower/``
merged, no tower      ``pytorch_model*.bin`` or ``model*.safetensors``       projector, ``language_model/``
====================  =====================================================  ==============================

Source: LLaVA release 1.2, ``llava/model/builder.py`` (reading) and ``llava/train/train.py`` (writing).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from babydoctor.conversation import get_template
from babydoctor.data.template_tokens import check_template
from babydoctor.data.tokens import load_tokenizer
from babydoctor.files import atomic_directory
from babydoctor.hub import model_commit
from babydoctor.imaging.preprocess import ImageMode, ImageSettings
from babydoctor.interop.llava_source import Source, open_source
from babydoctor.model.families import load_language_config
from babydoctor.model.language_model import build_language_model
from babydoctor.model.lora import PEFT_PREFIX, LoraUpdate
from babydoctor.model.run_dir import Manifest, Stage, describe_software, write_manifest
from babydoctor.model.tensor_files import save_tensors
from babydoctor.model.vision import build_projector
from babydoctor.model.weights import ShardWriter, WeightReader, load_pickle, local_directory
from babydoctor.schema import UserError

PROJECTOR_PREFIX = "model.mm_projector."
TOWER_PREFIX = "model.vision_tower.vision_tower."

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")

_OTHER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "generation_config.json",
)

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_LLAVA_KEYS = ("mm_", "tune_", "freeze_", "unfreeze_", "use_mm_", "image_", "tokenizer_", "_name_or_path", "auto_map")
"""Prefixes of the keys of a LLaVA ``config.json`` that do not belong to the language model."""


def import_llava(
    source: str | Path,
    out: Path,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    image_mode: ImageMode | None = None,
) -> Manifest:
    """Write a run directory from a LLaVA checkpoint, with one weight in memory at a time.

    Args:
        source: a directory or hub id.
        base: the language model below a projector or LoRA; None: the one that its configuration names.
        vision_tower: the CLIP tower; None: the one that the configuration names.
        template: the conversation template that it was trained with; LLaVA checkpoints do not record it. None: the
            usual one of its language model (``Source.template``).
        image_mode: None: ``image_aspect_ratio`` of the configuration.

    Raises:
        UserError: something is missing, has another architecture, or does not fit BabyDoctor, or the tokenizer lacks
            the template's tokens. ``out`` is then not created.
    """
    if template is not None:
        get_template(template)
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    checkpoint = open_source(source, base, vision_tower)
    template = template or checkpoint.template
    tower_directory = local_directory(checkpoint.vision_tower)
    tower_width = _tower_width(tower_directory)
    image = ImageSettings.from_processor_dir(tower_directory, image_mode or checkpoint.image_mode)
    with atomic_directory(out) as directory:
        if checkpoint.layout == "merged":
            parts = _import_merged(checkpoint, template, tower_directory, directory)
        else:
            parts = _import_trained_part(checkpoint, template, directory)
        _save_projector(checkpoint, parts.projector, tower_width, parts.text_width, directory)
        manifest = Manifest(
            name=Path(str(source)).name,
            language_model=parts.language_model,
            vision_tower=parts.vision_tower or checkpoint.vision_tower,
            projector=checkpoint.projector_kind,
            vision_layer=checkpoint.vision_layer,
            template=template,
            image_size=image.size,
            image_mode=image.mode,
            image_mean=image.mean,
            image_std=image.std,
            max_length=int(checkpoint.config.get("tokenizer_model_max_length") or 2048),
            dtype="float32" if checkpoint.config.get("torch_dtype") == "float32" else "bfloat16",
            lineage=(Stage(name=f"imported from {source}", steps=0, samples=0, data_fingerprint=""),),
            hub_commits={str(source): commit} if (commit := model_commit(str(source))) else {},
            **describe_software(),
        )
        write_manifest(directory, manifest)
    return manifest


def _check_tokenizer(tokenizer: str | Path, template: str, source: str) -> None:
    check_template(get_template(template), load_tokenizer(tokenizer), source, fix="give --template {template}")


def _tower_width(directory: Path) -> int:
    config = json.loads((directory / "config.json").read_text())
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(
            f"{directory}: model_type={config.get('model_type')!r} is not a CLIP tower; give one with --vision-tower"
        )
    return int(config.get("vision_config", config)["hidden_size"])


@dataclass(frozen=True)
class _Parts:
    """Parts that are not written yet: references for the manifest, and the weights of the projector."""

    projector: dict[str, torch.Tensor]
    text_width: int
    language_model: str
    vision_tower: str | None = None


def _import_trained_part(checkpoint: Source, template: str, out: Path) -> _Parts:
    """Read a projector, or a LoRA and a projector. The language model is not copied."""
    _check_tokenizer(checkpoint.language_model, template, checkpoint.language_model)
    is_lora = checkpoint.layout == "lora"
    path = checkpoint.directory / ("non_lora_trainables.bin" if is_lora else "mm_projector.bin")
    if not path.is_file():
        raise UserError(
            f"{path} is missing; a LLaVA LoRA stores its projector there. Copy it next to adapter_config.json"
        )
    projector = {}
    for name, weight in load_pickle(path).items():
        # Names begin with base_model.model. if a peft model was saved.
        plain = name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name
        if not plain.startswith(PROJECTOR_PREFIX):
            raise UserError(f"{path}: {name!r} is not a weight of the projector; BabyDoctor has no such weight")
        projector[plain.removeprefix(PROJECTOR_PREFIX)] = weight
    config = load_language_config(checkpoint.language_model)
    if is_lora:
        _copy_adapter(checkpoint, out / "adapter")
    return _Parts(projector, config.hidden_size, checkpoint.language_model)


def _copy_adapter(checkpoint: Source, out: Path) -> None:
    """Write the adapter as safetensors, checked against the base's shapes."""
    update = LoraUpdate(checkpoint.directory)
    config = load_language_config(checkpoint.language_model)
    shapes = {name: p.shape for name, p in build_language_model(config, torch.float32).named_parameters()}
    state = {}
    for module, sides in update.weights.items():
        shape = shapes.get(module + ".weight")
        if shape is None or not module.startswith("model.layers."):
            raise UserError(f"{checkpoint.directory}: {checkpoint.language_model} has no layer {module!r} for its LoRA")
        missing = {"A", "B"} - set(sides)
        if missing or (sides["B"].shape[0], sides["A"].shape[1]) != tuple(shape):
            found = {side: tuple(weight.shape) for side, weight in sides.items()}
            raise UserError(f"{checkpoint.directory}: the LoRA {found} of {module!r} does not fit {tuple(shape)}")
        for side, weight in sides.items():
            state[f"{PEFT_PREFIX}{module}.lora_{side}.weight"] = weight.contiguous()
    out.mkdir()
    save_tensors(state, out / "adapter_model.safetensors")
    values = {**update.config, "base_model_name_or_path": checkpoint.language_model, "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")


def _import_merged(checkpoint: Source, template: str, tower_directory: Path, out: Path) -> _Parts:
    """Copy a complete model from one folder: language model, projector and, if present, the tower."""
    source = checkpoint.directory
    language_directory = out / "language_model"
    language_directory.mkdir()
    _write_language_config(checkpoint, language_directory)
    _copy_tokenizer(source, language_directory)
    _check_tokenizer(language_directory, template, str(source))
    config = load_language_config(language_directory)
    missing = {name: p.shape for name, p in build_language_model(config, torch.float32).named_parameters()}
    if config.tie_word_embeddings:
        missing.pop("lm_head.weight", None)
    language, tower = ShardWriter(language_directory), None
    projector: dict[str, torch.Tensor] = {}
    for name, weight in WeightReader(source).show_progress("Importing weights"):
        if name.startswith(PROJECTOR_PREFIX):
            projector[name.removeprefix(PROJECTOR_PREFIX)] = weight.clone()
        elif name.startswith(TOWER_PREFIX):
            tower = tower or ShardWriter(out / "vision_tower")
            if not name.endswith("position_ids"):  # a buffer that older transformers saved
                tower.write(name.removeprefix(TOWER_PREFIX), weight)
        elif name in missing:
            if weight.shape != missing[name]:
                raise UserError(
                    f"{source}: {name!r} has the shape {tuple(weight.shape)}, but config.json requires "
                    f"{tuple(missing[name])}"
                )
            language.write(name, weight)
            del missing[name]
        elif not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{source} holds a weight {name!r} that does not belong to a LLaVA on {config.model_type}")
    if missing:
        raise UserError(f"{source} lacks {len(missing)} weights, the first is {next(iter(missing))!r}")
    language.close()
    if tower is None:
        return _Parts(projector, config.hidden_size, "./language_model")
    tower.close()
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        if (tower_directory / name).is_file():
            shutil.copy2(tower_directory / name, out / "vision_tower")
    return _Parts(projector, config.hidden_size, "./language_model", "./vision_tower")


def _copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of the tokenizer and the generation settings."""
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"{source} holds neither {' nor '.join(_TOKENIZER_FILES)}; copy them from its base model")
    for name in (*_TOKENIZER_FILES, *_OTHER_FILES):
        if (source / name).is_file():
            shutil.copy2(source / name, out / name)


def _write_language_config(checkpoint: Source, out: Path) -> None:
    config = {key: value for key, value in checkpoint.config.items() if not key.startswith(_LLAVA_KEYS)}
    config.update(model_type=checkpoint.family, architectures=[_ARCHITECTURES[checkpoint.family]])
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_projector(
    checkpoint: Source, weights: dict[str, torch.Tensor], vision_width: int, text_width: int, out: Path
) -> None:
    """Check names and shapes, then write ``projector.safetensors``."""
    expected = build_projector(checkpoint.projector_kind, vision_width, text_width).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if wanted != found:
            raise UserError(
                f"{checkpoint.directory}: the projector's {name!r} is {found}; a {checkpoint.projector_kind!r} "
                f"projector from width {vision_width} to {text_width} has {wanted} there"
            )
    save_tensors(weights, out / "projector.safetensors")
