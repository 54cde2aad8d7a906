"""Attention from each token of an answer to the patches of the image ("Where it looked" in the web UI).

Shapes: ``T`` tokens of prompt and answer, ``A`` answer tokens, ``H`` query heads, ``D`` hidden size, ``P`` image slots.

The weights are averaged over heads and layers. They show which positions contributed to a token's hidden state, but do
not prove what the answer is based on (Jain and Wallace 2019, "Attention is not Explanation").
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
    """Run prompt and answer through the model once and collect the attention to the image.

    Args:
        embeds: ``[T, D]`` input embeddings. The last ``num_answer`` rows are the tokens of the answer.
        image_mask: ``[T]`` bool, true at the ``P`` image slots.

    Returns:
        ``[A, P]`` float32 on the CPU. Row ``a`` is the attention of the position that predicted answer token ``a``,
        which is the position before it. Each row sums to the share of attention that the image received.
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
    """Attention of one layer. Returns the weights ``[H, T, T]`` in float32 and the output ``[T, D]``."""
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
