"""The decoder layer for training: it runs over packed documents and keeps little for the backward pass.

The weights are those of transformers' modules. Only the computation is implemented here.

Shapes: ``T`` tokens of all documents end to end, ``Q`` tokens whose output is needed, ``W`` hidden size, ``H`` heads,
``D`` head size, ``I`` feed-forward size.

Source: LLaMA (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020).
Mistral, Qwen2 and Qwen3 differ as ``model/families.py`` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from babydoctor.data.layout import AttentionLayout
from babydoctor.model.packed.attention import attend
from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.model.packed.lora_linear import apply_linears


def decoder_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    attention_layout: AttentionLayout,
    tail: torch.Tensor | None = None,
    ops: ElementwiseOps = PLAIN_OPS,
    window: int | None = None,
) -> torch.Tensor:
    """One layer of the decoder.

    Args:
        layer: transformers' decoder layer of one of the accepted families.
        hidden: ``[T, W]``.
        cos, sin: ``[T, D]``.
        attention_layout: which query rows see which keys; its rows are the ``Q`` tokens of ``tail``.
        tail: ``[Q]`` int64, the tokens whose output is needed. Keys and values are computed for all ``T`` tokens, the
            rest only for these. None: all tokens.
        ops: the elementwise operations.
        window: how many keys a query sees, its own included; None: all up to its own.

    Returns:
        ``[Q, W]``.
    """
    modules: Any = layer
    attention, mlp = modules.self_attn, modules.mlp

    normed = ops.rms_norm(hidden, modules.input_layernorm)  # [T, W]
    if tail is None:
        query, key, value = apply_linears(normed, [attention.q_proj, attention.k_proj, attention.v_proj], ops)
        query, key, value = (x.unflatten(1, (-1, attention.head_dim)) for x in (query, key, value))  # [T, H, D]
        query, key = _normalize_heads(attention, query, key, ops)
        query, key = ops.rotate_pair(query, key, cos, sin)
    else:
        key, value = apply_linears(normed, [attention.k_proj, attention.v_proj], ops)
        (query,) = apply_linears(normed.index_select(0, tail), [attention.q_proj], ops)
        query, key, value = (x.unflatten(1, (-1, attention.head_dim)) for x in (query, key, value))
        query, key = _normalize_heads(attention, query, key, ops)
        query_cos, query_sin, hidden = (x.index_select(0, tail) for x in (cos, sin, hidden))
        query, key = ops.rotate(query, query_cos, query_sin), ops.rotate(key, cos, sin)
    mixed = attend(query, key, value, attention_layout, window)  # [Q, H, D]
    hidden = hidden + apply_linears(mixed.flatten(1), [attention.o_proj], ops)[0]

    normed = ops.rms_norm(hidden, modules.post_attention_layernorm)
    gate, up = apply_linears(normed, [mlp.gate_proj, mlp.up_proj], ops)  # [Q, I]
    return hidden + apply_linears(ops.swiglu(gate, up), [mlp.down_proj], ops)[0]


def _normalize_heads(
    attention: Any, query: torch.Tensor, key: torch.Tensor, ops: ElementwiseOps
) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3's RMSNorm of each head, ``[T, H, D]``; nothing for the other families."""
    if not hasattr(attention, "q_norm"):
        return query, key
    return ops.rms_norm(query, attention.q_norm), ops.rms_norm(key, attention.k_norm)
