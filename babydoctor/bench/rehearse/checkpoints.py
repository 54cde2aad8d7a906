"""Write random weights in the layouts of the published checkpoints: LLaMA-2-7B-chat and the complete CLIP ViT-L/14.

Sources: the file lists and headers of ``meta-llama/Llama-2-7b-chat-hf`` (two shards, the rotary frequencies of every
layer among the weights) and ``openai/clip-vit-large-patch14`` (one float32 file with both towers and their position
ids). Run as a program: ``python -m babydoctor.bench.rehearse.checkpoints SIZE FOLDER``.
"""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from babydoctor.bench.rehearse.sizes import Size, find_size
from babydoctor.model.weights import ShardWriter
from babydoctor.progress import ByteProgress

IMAGE_SIZE, PATCH_SIZE = 224, 14
PROJECTION_DIM = 768
MAX_POSITIONS = 4096

_ONSETS = "b c d f g h j k l m n p qu r s t v w x z bl br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sp st str th tr"
_VOWELS = "a e i o u ai ea ou oo y"
_CODAS = "n r s t l m d ck st nd ng"


def write_checkpoints(size: Size, folder: Path) -> None:
    """Write ``folder/llama`` and ``folder/clip``."""
    write_llama(size, folder / "llama")
    write_tokenizer(size.language["vocab_size"], folder / "llama")
    write_clip(size, folder / "clip")


def write_llama(size: Size, folder: Path) -> None:
    """Write sharded bfloat16 weights with an index, ``config.json`` and ``generation_config.json``."""
    shards = ShardWriter(folder, shard_bytes=size.shard_bytes)
    torch.manual_seed(0)
    with ByteProgress("Writing random LLaMA weights", language_model_bytes(size.language)) as progress:
        for name, weight in _llama_weights(size.language):
            shards.write(name, weight)
            progress.advance(weight.nbytes)
    shards.close()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.32.0.dev0",
        "use_cache": True,
        **size.language,
    }
    generation = {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "temperature": 0.6,
        "max_length": MAX_POSITIONS,
        "top_p": 0.9,
        "transformers_version": "4.32.0.dev0",
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def language_model_bytes(sizes: dict[str, int]) -> int:
    """Bytes of the bfloat16 matrices of a LLaMA with as many key and value heads as query heads."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    layers = sizes["num_hidden_layers"] * hidden * (4 * hidden + 3 * inner)
    return 2 * (layers + 2 * sizes["vocab_size"] * hidden)


def _llama_weights(sizes: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight with its published name, in the published order."""
    hidden, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head_dim = hidden // sizes["num_attention_heads"]
    kv_size = head_dim * sizes["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    # Wider than the published initialization in tiny models, so that every layer matters to the answer.
    std = max(0.02, 0.7 / hidden**0.5)
    # With small embeddings the image would dominate, and every greedy token would be the same.
    yield "model.embed_tokens.weight", _random(vocabulary, hidden, std=0.5)
    for index in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        for name, shape in shapes.items():
            yield f"{prefix}.{name}.weight", _random(*shape, std=std)
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        yield f"{prefix}.self_attn.rotary_emb.inv_freq", frequencies
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16)
    yield "lm_head.weight", _random(vocabulary, hidden, std=std)


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write a SentencePiece BPE tokenizer with byte fallback and the files of the published one.

    It is trained on made-up words, because LLaMA's own tokenizer may not be redistributed.
    """
    import sentencepiece
    from transformers import AutoTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_made_up_text(vocab_size)),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {key: {"content": name, **flags} for key, name in names.items()}
    added = {key: {"__type": "AddedToken", **token} for key, token in special.items()}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **added,
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", config)
    fast: Any = AutoTokenizer.from_pretrained(str(folder))
    assert len(fast) == vocab_size, (len(fast), vocab_size)
    fast.backend_tokenizer.save(str(folder / "tokenizer.json"))


def _made_up_text(vocab_size: int) -> Iterator[str]:
    """Lines of pseudo-words, enough of them for ``vocab_size`` pieces, and one line with every ASCII character."""
    generator = random.Random(0)
    onsets, vowels, codas = _ONSETS.split(), _VOWELS.split(), ["", *_CODAS.split()]

    def syllable() -> str:
        return generator.choice(onsets) + generator.choice(vowels) + generator.choice(codas)

    yield " ".join(chr(code) for code in range(33, 127))
    yield "The chest scan shows a nodule in the left lung. What does the image show? Is there an effusion?"
    for _ in range(vocab_size // 12 + 100):
        yield " ".join("".join(syllable() for _ in range(generator.randint(1, 3))) for _ in range(12))


def write_clip(size: Size, folder: Path) -> None:
    """Write one float32 ``model.safetensors`` with both towers, ``config.json`` and ``preprocessor_config.json``."""
    torch.manual_seed(1)
    shards = ShardWriter(folder, shard_bytes=2**62)
    text_positions = 77
    num_positions = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    vision, text = size.vision, size.text
    projection = min(PROJECTION_DIM, vision["hidden_size"])
    weights: list[tuple[str, tuple[int, ...]]] = [
        ("logit_scale", ()),
        ("text_projection.weight", (projection, text["hidden_size"])),
    ]
    weights += [("visual_projection.weight", (projection, vision["hidden_size"]))]
    weights += [("text_model.embeddings.token_embedding.weight", (text["vocab_size"], text["hidden_size"]))]
    weights += [("text_model.embeddings.position_embedding.weight", (text_positions, text["hidden_size"]))]
    weights += _tower("text_model", text, ("final_layer_norm",))
    width = vision["hidden_size"]
    weights += [("vision_model.embeddings.class_embedding", (width,))]
    weights += [("vision_model.embeddings.patch_embedding.weight", (width, 3, PATCH_SIZE, PATCH_SIZE))]
    weights += [("vision_model.embeddings.position_embedding.weight", (num_positions, width))]
    weights += _tower("vision_model", vision, ("pre_layrnorm", "post_layernorm"))
    for name, shape in weights:
        shards.write(name, _clip_weight(name, shape))
    shards.write("text_model.embeddings.position_ids", torch.arange(text_positions)[None])
    shards.write("vision_model.embeddings.position_ids", torch.arange(num_positions)[None])
    shards.close()
    common = {"attention_dropout": 0.0, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05}
    common["projection_dim"] = projection
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {**common, **text, "max_position_embeddings": text_positions, "model_type": "clip_text_model"},
        "torch_dtype": "float32",
        "vision_config": {
            **common,
            **vision,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "model_type": "clip_vision_model",
        },
    }
    processor = {
        "crop_size": IMAGE_SIZE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": IMAGE_SIZE,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", processor)


def _tower(prefix: str, sizes: dict[str, int], norms: tuple[str, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a transformer's layers and of the norms around them."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    linears = {f"self_attn.{name}_proj": (width, width) for name in "kvq"} | {"self_attn.out_proj": (width, width)}
    linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    found: list[tuple[str, tuple[int, ...]]] = []
    for index in range(sizes["num_hidden_layers"]):
        for name, shape in linears.items():
            found += [(f"{prefix}.encoder.layers.{index}.{name}.weight", shape)]
            found += [(f"{prefix}.encoder.layers.{index}.{name}.bias", shape[:1])]
        for norm in ("layer_norm1", "layer_norm2"):
            found += [(f"{prefix}.encoder.layers.{index}.{norm}.{part}", (width,)) for part in ("weight", "bias")]
    return found + [(f"{prefix}.{norm}.{part}", (width,)) for norm in norms for part in ("weight", "bias")]


def _clip_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if name == "logit_scale":
        return torch.tensor(4.6052)
    if "norm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape) * max(0.02, 0.7 / shape[-1] ** 0.5 if len(shape) == 2 else 0.02)


def _random(*shape: int, std: float) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_checkpoints(find_size(sys.argv[1]), Path(sys.argv[2]))
