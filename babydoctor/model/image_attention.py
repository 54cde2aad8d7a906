"""Where the model looked: attention from each word of an answer to the patches of the image.

Shapes: ``T`` positions of prompt and answer, ``A`` answer tokens, ``H`` query heads, ``K`` key/value heads, ``W`` head
width, ``D`` model width, ``P`` image positions.

Attention weights say which positions were mixed into a token's state, averaged here over heads and layers. They are not
a proof of what the answer rests on (Jain and Wallace 2019, "Attention is not Explanation").
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@torch.inference_mode()
def image_attention(
    language_model: LlamaForCausalLM, embeds: torch.Tensor, image_mask: torch.Tensor, num_answer: int
) -> torch.Tensor:
    """Run prompt and answer once and collect attention to the image.

    Args:
        embeds: ``[T, D]`` input embeddings; the last ``num_answer`` rows are the answer's tokens.
        image_mask: ``[T]`` bool, true at the ``P`` image positions.

    Returns:
        ``[A, P]`` float32 on the CPU. Row ``a`` belongs to the position that chose answer token ``a``, which is the one
        before it. Rows sum to the share of attention that went to the image.
    """
    length = len(embeds)
    assert 0 < num_answer < length and image_mask.shape == (length,), (num_answer, length, image_mask.shape)
    body = language_model.model
    positions = torch.arange(length, device=embeds.device)
    rotary = body.rotary_emb(embeds[None], positions[None])
    mask = torch.full((length, length), float("-inf"), device=embeds.device).triu(1)
    image = image_mask.to(embeds.device).nonzero()[:, 0]
    looked = torch.zeros(num_answer, len(image), device=embeds.device)
    hidden = embeds
    for layer in body.layers:
        weights, mixed = _attend(layer.self_attn, layer.input_layernorm(hidden), rotary, mask)
        looked += weights[:, length - num_answer - 1 : length - 1, image].mean(0)
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return (looked / len(body.layers)).cpu()


def _attend(
    attention: Any, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of one layer that keeps its weights: ``[H, T, T]`` float32 and the output ``[T, D]``."""
    length = len(hidden)
    query, key, value = (
        project(hidden).view(1, length, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    groups = query.shape[1] // key.shape[1]
    key, value = key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
    scores = torch.matmul(query[0], key.transpose(1, 2)).float() * attention.scaling + mask
    weights = torch.softmax(scores, dim=-1)
    mixed = torch.matmul(weights.to(value.dtype), value).transpose(0, 1).reshape(length, -1)
    return weights, attention.o_proj(mixed)
