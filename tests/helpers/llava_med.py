"""microsoft/llava-med-v1.5-mistral-7b in small: its files, configuration keys and weight names, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
VOCAB_SIZE = 400


def write_llava_med(folder: Path, *, sliding_window: int | None = None) -> Any:
    """Write ``folder/llava-med`` and its tower, ``folder/clip``.

    Returns:
        transformers' own ``MistralForCausalLM``, ``CLIPVisionModel`` and the projector, with the same weights.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

    from babydoctor.bench.rehearse.checkpoints import write_tokenizer

    out = folder / "llava-med"
    out.mkdir()
    write_tokenizer(VOCAB_SIZE, out)
    (out / "tokenizer.json").unlink()  # not among the published files
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "legacy": True, "model_max_length": 2048}))
    torch.manual_seed(0)
    config = MistralConfig(
        **SIZES, vocab_size=VOCAB_SIZE, sliding_window=sliding_window, initializer_range=0.1, eos_token_id=2
    )
    language_model = MistralForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        language_model.lm_head.weight[: 3 + 256] = 0  # no byte and no control token: the answer is whole words
    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
    )
    tower = CLIPVisionModel(clip).eval()
    tower.save_pretrained(folder / "clip")
    side = 42
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder / "clip"
    )
    projector = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    weights = {name: x.detach().clone() for name, x in language_model.named_parameters()}
    weights |= {f"model.mm_projector.{name}": x.detach().clone() for name, x in projector.named_parameters()}
    for name, x in tower.named_parameters():
        plain = name.removeprefix("vision_model.")
        weights[f"model.vision_tower.vision_tower.vision_model.{plain}"] = x.detach().clone()
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    published = {
        "architectures": ["LlavaMistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "freeze_mm_vision_resampler": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_mistral",
        "sliding_window": sliding_window,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.36.2",
        "tune_mm_mlp_adapter": False,
        "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": VOCAB_SIZE,
        **SIZES,
    }
    (out / "config.json").write_text(json.dumps(published))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return language_model, tower, projector
