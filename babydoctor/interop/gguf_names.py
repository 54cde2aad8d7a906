"""transformers' names of weights -> llama.cpp's."""

from __future__ import annotations

import re

_BLOCK_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_down",  # names in llama.cpp's first LLaVA files; it still decides by the shapes
    "mlp.fc2": "ffn_up",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
LANGUAGE_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}


def language_name(name: str) -> str:
    """transformers' name of a language model's weight -> llama.cpp's."""
    if name in LANGUAGE_NAMES:
        return LANGUAGE_NAMES[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match and match[2] in _BLOCK_PARTS, name
    return f"blk.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}"


def tower_name(name: str) -> str:
    """A tower's or projector's weight -> llama.cpp's name."""
    if name in _TOWER_NAMES:
        return _TOWER_NAMES[name]
    if name.startswith("projector."):
        return name.replace("projector.", "mm.")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match and match[2] in _BLOCK_PARTS, name
    return f"v.blk.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}"
