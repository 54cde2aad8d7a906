"""Attention over packed documents.

Shapes: ``H`` query heads, ``K`` key/value heads, ``T`` positions of all documents end to end, ``Q`` of them that ask,
``D`` head width.

A packed micro-batch is one row of ``T`` positions. Each document attends to itself alone, so attention is computed
document by document: the work is the sum of the squared lengths, not the square of their sum, and no mask of
``T x T`` is ever built. CUDA has one variable-length kernel for it; on the CPU it goes block by block below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "babydoctor_packed"
"""The value of ``config._attn_implementation`` under which transformers finds ``packed_attention``."""

QUERY_BLOCK = 128
"""Queries that the CPU treats at once. Keys after the block's last query are skipped, so smaller blocks save work,
and a block's scores stay in the cache; below 128 the matrix products become too small to run fast."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: Sequence[int],
    query_lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """Causal attention inside each document, scaled by ``D ** -0.5``.

    Args:
        query: ``[Q, H, D]``.
        key, value: ``[T, K, D]``.
        document_lengths: lengths that sum to ``T``.
        query_lengths: how many of each document's last positions ask; they sum to ``Q``. None: all of them.

    Returns:
        ``[Q, H, D]``.
    """
    query_lengths = document_lengths if query_lengths is None else query_lengths
    assert sum(document_lengths) == len(key) and sum(query_lengths) == len(query), (query.shape, key.shape)
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = _varlen_attention(query, key, value, document_lengths, query_lengths)
        if output is not None:
            return output
    output = _BlockAttention.apply(query, key, value, tuple(document_lengths), tuple(query_lengths))
    assert isinstance(output, torch.Tensor)
    return output


class _BlockAttention(torch.autograd.Function):
    """Blocks of queries against the keys up to the block's end; the backward pass reuses the probabilities.

    Blocks of the same size are multiplied together, whatever document they are from: on two cores, eight documents at
    once reach twice the rate of one after the other. torch's own kernel for the CPU ran at a tenth of the matrix
    multiplication rate (bfloat16, 300 positions).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        document_lengths: tuple[int, ...],
        query_lengths: tuple[int, ...],
    ) -> torch.Tensor:
        q, k, v = (_by_head(x) for x in (query, key, value))
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        mask = _causal_strip(max(document_lengths, default=0), query)
        scale = query.shape[-1] ** -0.5
        keep = any(ctx.needs_input_grad)
        saved = []
        groups = _equal_blocks(document_lengths, query_lengths)
        for (num_rows, num_keys), blocks in groups.items():
            rows, keys = zip(*blocks, strict=True)
            end = mask.shape[1] - QUERY_BLOCK + num_rows
            scores = torch.baddbmm(
                mask[:num_rows, end - num_keys : end], _gather(q, rows), _gather(k, keys).transpose(1, 2), alpha=scale
            )
            probabilities = torch.softmax(scores, dim=-1)
            mixed = torch.bmm(probabilities, _gather(v, keys))
            for place, part in zip(rows, mixed.chunk(len(blocks)), strict=True):
                output[place] = part.transpose(0, 1)
            if keep:
                saved.append(probabilities)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.groups = groups
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad = _by_head(grad_output)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for blocks, probabilities in zip(ctx.groups.values(), saved, strict=True):
            rows, keys = zip(*blocks, strict=True)
            grad_block = _gather(grad, rows)
            grad_p = torch.bmm(grad_block, _gather(v, keys).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype).mul_(scale)
            _add(grad_v, keys, torch.bmm(probabilities.transpose(1, 2), grad_block))
            _add(grad_k, keys, torch.bmm(grad_scores.transpose(1, 2), _gather(q, rows)))
            for place, part in zip(rows, torch.bmm(grad_scores, _gather(k, keys)).chunk(len(blocks)), strict=True):
                grad_q[:, place] = part
        return grad_q.transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1), None, None


def _equal_blocks(
    document_lengths: Sequence[int], query_lengths: Sequence[int]
) -> dict[tuple[int, int], list[tuple[slice, slice]]]:
    """All blocks by size (queries, keys). A block is (rows of the queries, rows of the keys up to its last query)."""
    groups: dict[tuple[int, int], list[tuple[slice, slice]]] = {}
    first_row = first_key = 0
    for length, asking in zip(document_lengths, query_lengths, strict=True):
        for start in range(0, asking, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, asking)
            num_keys = length - asking + stop
            block = slice(first_row + start, first_row + stop), slice(first_key, first_key + num_keys)
            groups.setdefault((stop - start, num_keys), []).append(block)
        first_row += asking
        first_key += length
    return groups


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[T, H, D]`` -> ``[H, T, D]`` with each head's positions side by side, as matrix products want them."""
    return x.transpose(0, 1).contiguous()


def _gather(x: torch.Tensor, places: Sequence[slice]) -> torch.Tensor:
    """``[H, T, D]`` -> ``[places * H, n, D]``."""
    return x[:, places[0]] if len(places) == 1 else torch.cat([x[:, place] for place in places])


def _add(total: torch.Tensor, places: Sequence[slice], parts: torch.Tensor) -> None:
    """Add ``parts`` ``[places * H, n, D]`` to their places in ``total`` ``[H, T, D]``."""
    for place, part in zip(places, parts.chunk(len(places)), strict=True):
        total[:, place] += part


def _causal_strip(longest: int, like: torch.Tensor) -> torch.Tensor:
    """``[QUERY_BLOCK, longest + QUERY_BLOCK]``: zeros, and at the right end a causal triangle.

    A block of ``n`` queries against ``m`` keys finds its mask in the first ``n`` rows, in the ``m`` columns that end
    ``QUERY_BLOCK - n`` before the right edge.
    """
    strip = torch.zeros(QUERY_BLOCK, longest + QUERY_BLOCK, dtype=like.dtype, device=like.device)
    strip[:, longest:] = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, device=like.device).triu_(1)
    return strip


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: Sequence[int],
    query_lengths: Sequence[int],
) -> torch.Tensor | None:
    """One variable-length kernel for all documents, where this torch has it; None otherwise.

    Its causal mask is aligned to the last query and the last key, which is what a document's tail needs.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    query_bounds, key_bounds = (
        torch.tensor((0, *lengths), dtype=torch.int32, device=query.device).cumsum(0, dtype=torch.int32)
        for lengths in (query_lengths, document_lengths)
    )
    causal: Any = {"window_size": (-1, 0)}
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    output = varlen_attn(q, k, v, query_bounds, key_bounds, max(query_lengths), max(document_lengths), **causal)
    assert isinstance(output, torch.Tensor)
    return output


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
    """Causal attention inside each document, in the form that transformers' own LLaMA layers call.

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
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped, dropout_p=dropout)
        for q, k, v in zip(*(x.split(document_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None
