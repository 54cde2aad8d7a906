"""``babydoctor export --format hf``: a directory for transformers' ``LlavaForConditionalGeneration``.

Weights are named as in llava-hf/llava-1.5-7b-hf. transformers 4 and 5, vLLM and SGLang all read these names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from babydoctor.conversation import get_template
from babydoctor.interop.chat_template import adds_prefix_everywhere, build_chat_template
from babydoctor.interop.plain import PlainRun
from babydoctor.model.families import has_class_token
from babydoctor.model.weights import ShardWriter
from babydoctor.schema import IMAGE_TOKEN, UserError


def export_hf(run: PlainRun, out: Path, dtype: torch.dtype) -> list[str]:
    """Write the directory with one weight in memory at a time.

    Returns:
        Lines for the user about differences in the other software, if there are any.

    Raises:
        UserError: the format cannot represent this run exactly.
    """
    if run.manifest.image_size != run.vision_config.image_size:
        raise UserError(
            f"{run.path}: images have {run.manifest.image_size} px, the tower takes {run.vision_config.image_size} px"
        )
    projector = run.mlp_projector()
    image_token_id, vocab_size = write_tokenizer(run, out)
    write_config(run, out, image_token_id, vocab_size, dtype)
    write_processor(run, out)
    shards = ShardWriter(out)
    for name, weight in run.language_weights("Writing the language model"):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = add_rows(weight, vocab_size, run.tokenizer.unk_token_id or 0)
        shards.write(f"language_model.{name}", weight.to(dtype))
    for name, weight in run.tower_weights():
        shards.write(f"vision_tower.vision_model.{name}", weight.to(dtype))
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        for part in ("weight", "bias"):
            shards.write(f"multi_modal_projector.{theirs}.{part}", projector[f"{ours}.{part}"].to(dtype))
    shards.close()
    return list(_notes(run))


def _notes(run: PlainRun) -> Iterator[str]:
    kind = "LlavaImageProcessor (do_pad)" if run.manifest.image_mode == "pad" else "CLIPImageProcessor"
    yield f"Images go through {kind}. With Pillow pixels equal this run's; torchvision may round differently."
    if run.manifest.template == "plain":
        yield "The template 'plain' writes a single line: stop at a newline."


def add_rows(weight: torch.Tensor, num_rows: int, like: int) -> torch.Tensor:
    """Rows for new ids, copied from row ``like`` (the unknown token).

    A zero row would give its id the logit 0, which may be the largest. A copied row gives the same logit as the unknown
    token, which no trained model writes.
    """
    missing = num_rows - len(weight)
    return torch.cat([weight, weight[like : like + 1].expand(missing, -1)]) if missing > 0 else weight


def write_tokenizer(run: PlainRun, out: Path) -> tuple[int, int]:
    """Write the tokenizer with ``<image>`` as an additional token.

    Returns:
        The id of ``<image>`` and the new size of the vocabulary.
    """
    tokenizer = run.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(image_token_id, int), image_token_id
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    template = get_template(run.manifest.template)
    has_begin = tokenizer.bos_token is not None
    spaces = not adds_prefix_everywhere(tokenizer)
    tokenizer.chat_template = build_chat_template(template, spaces=spaces, has_begin=has_begin)
    tokenizer.save_pretrained(str(out))
    return image_token_id, max(run.language_config.vocab_size, image_token_id + 1)


def write_config(run: PlainRun, out: Path, image_token_id: int, vocab_size: int, dtype: torch.dtype) -> None:
    """``config.json`` and ``generation_config.json``."""
    name = str(dtype).removeprefix("torch.")
    text = {**run.language_config_values(), "vocab_size": vocab_size, "torch_dtype": name, "tie_word_embeddings": False}
    vision = run.vision_config.to_dict()
    for key in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        vision.pop(key, None)
    if not has_class_token(run.vision_config):
        vision["vision_use_head"] = False  # SigLIP's pooling head is not written
    config: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "image_seq_length": run.num_patches,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": run.manifest.vision_layer,
        "vision_feature_select_strategy": select_strategy(run),
        "tie_word_embeddings": False,
        # SGLang reads these two keys. Without them it splits images into tiles.
        "image_aspect_ratio": run.manifest.image_mode,
        "mm_patch_merge_type": "flat",
        "torch_dtype": name,
        "text_config": text,
        "vision_config": vision,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    generation = {
        **run.generation_tokens,
        "pad_token_id": run.tokenizer.pad_token_id,
        "suppress_tokens": [image_token_id],
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def select_strategy(run: PlainRun) -> str:
    """transformers' name for all tokens of the tower but CLIP's class token."""
    return "default" if has_class_token(run.vision_config) else "full"


def write_processor(run: PlainRun, out: Path) -> None:
    """The processor's files, in the layout that transformers 4 and 5 both read."""
    image = run.manifest.image
    is_pad = image.mode == "pad"
    preprocessor: dict[str, Any] = {
        "processor_class": "LlavaProcessor",
        "image_processor_type": "LlavaImageProcessor" if is_pad else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image.size, "width": image.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if is_pad:
        preprocessor["do_pad"] = True
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": run.vision_config.patch_size,
        "num_additional_image_tokens": int(has_class_token(run.vision_config)),
        "vision_feature_select_strategy": select_strategy(run),
    }
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
