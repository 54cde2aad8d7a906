"""Attention over packed documents, plugged into transformers' LLaMA.

Shapes: ``H`` query heads, ``K`` key/value heads, ``T`` positions of all documents end to end, ``D`` head width.

A packed micro-batch is one row of ``T`` positions. Each document attends to itself alone, so attention is computed
document by document: the work is the sum of the squared lengths, not the square of their sum, and no mask of
``T x T`` is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "babydoctor_packed"
"""The value of ``config._attn_implementation`` under which transformers finds ``packed_attention``."""


def register_packed_attention() -> None:
    """Make ``packed_attention`` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document.

    Args:
        query: ``[1, H, T, D]``.
        key, value: ``[1, K, T, D]``.
        document_lengths: lengths that sum to ``T``. Without it this is transformers' ordinary ``sdpa``, so that
            ``generate`` and padded batches work on the same model.

    Returns:
        ``[1, T, H, D]`` and None, as transformers expects.
    """
    if document_lengths is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    assert query.shape[0] == 1 and sum(document_lengths) == query.shape[2], (query.shape, document_lengths)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = _varlen_attention(query, key, value, document_lengths, scaling)
        if output is not None:
            return output, None
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped, dropout_p=dropout)
        for q, k, v in zip(*(x.split(document_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor | None:
    """One variable-length kernel for all documents, where this torch has it and it fits; None otherwise."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    is_default_scale = scaling is None or abs(scaling - query.shape[-1] ** -0.5) < 1e-9
    if query.shape[1] != key.shape[1] or not is_default_scale:
        return None  # not every release takes grouped heads or another scale
    lengths = torch.tensor((0, *document_lengths), dtype=torch.int32, device=query.device)
    ends = lengths.cumsum(0, dtype=torch.int32)
    longest = max(document_lengths)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    causal: Any = {"window_size": (-1, 0)}
    output = varlen_attn(q, k, v, ends, ends, longest, longest, **causal)
    assert isinstance(output, torch.Tensor)
    return output[None]
