"""LLaMA's decoder layer as training runs it: over packed documents, with as little kept for the backward pass as
possible. The weights stay in transformers' modules; only the order of computation is ours.

Shapes: ``T`` positions of all documents end to end, ``Q`` of them whose result is wanted, ``W`` width, ``H`` heads,
``D`` head width, ``I`` width of the feed-forward layer.

Source: LLaMA (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from babydoctor.model.packed.attention import attend
from babydoctor.model.packed.fused_ops import rms_norm, rotate, swiglu
from babydoctor.model.packed.lora_linear import apply_linears


def decoder_layer(
    layer: nn.Module,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    document_lengths: Sequence[int],
    tail_lengths: Sequence[int] | None = None,
    prefix_length: int = 0,
) -> torch.Tensor:
    """One layer of LLaMA.

    Args:
        layer: transformers' ``LlamaDecoderLayer``.
        hidden: ``[T, W]``.
        cos, sin: ``[T, D]``.
        tail_lengths: how many of each document's last positions are wanted, summing to ``Q``; keys and values are
            computed everywhere, all else only there. None: all positions, the prefix's too.
        prefix_length: first positions, which every document sees; see ``attention.py``.

    Returns:
        ``[Q, W]``.
    """
    modules: Any = layer
    attention, mlp = modules.self_attn, modules.mlp
    tail = None if tail_lengths is None else tail_index(document_lengths, tail_lengths, hidden.device, prefix_length)

    normed = rms_norm(hidden, modules.input_layernorm)
    if tail is None:
        query, key, value = apply_linears(normed, [attention.q_proj, attention.k_proj, attention.v_proj])
        query_cos, query_sin = cos, sin
    else:
        key, value = apply_linears(normed, [attention.k_proj, attention.v_proj])
        (query,) = apply_linears(normed[tail], [attention.q_proj])
        query_cos, query_sin, hidden = cos[tail], sin[tail], hidden[tail]
    query, key, value = (x.unflatten(1, (-1, attention.head_dim)) for x in (query, key, value))
    query, key = rotate(query, query_cos, query_sin), rotate(key, cos, sin)
    mixed = attend(query, key, value, document_lengths, tail_lengths, prefix_length)
    hidden = hidden + apply_linears(mixed.flatten(1), [attention.o_proj])[0]

    normed = rms_norm(hidden, modules.post_attention_layernorm)
    gate, up = apply_linears(normed, [mlp.gate_proj, mlp.up_proj])
    return hidden + apply_linears(swiglu(gate, up), [mlp.down_proj])[0]


def tail_index(
    document_lengths: Sequence[int],
    tail_lengths: Sequence[int],
    device: torch.device | str = "cpu",
    prefix_length: int = 0,
) -> torch.Tensor:
    """``[Q]`` int64: where the last positions of each document stand."""
    pieces, end = [], prefix_length
    for length, wanted in zip(document_lengths, tail_lengths, strict=True):
        assert wanted <= length, (wanted, length)
        end += length
        pieces.append(torch.arange(end - wanted, end))
    return torch.cat(pieces).to(device)
