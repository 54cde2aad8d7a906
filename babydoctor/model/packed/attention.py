"""Attention over packed documents.

Shapes: ``H`` query heads, ``K`` key/value heads, ``T`` positions of all documents end to end, ``Q`` of them that ask,
``D`` head width.

A packed micro-batch is one row of ``T`` positions. Each document attends to itself alone, so attention is computed
document by document: the work is the sum of the squared lengths, not the square of their sum, and no mask of
``T x T`` is ever built. CUDA has one variable-length kernel for it; on the CPU it goes block by block below.

What all documents begin with may stand in front of them once, as the row's first ``prefix_length`` positions: it
attends to itself, and every document to it and to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "babydoctor_packed"
"""The value of ``config._attn_implementation`` under which transformers finds ``packed_attention``."""

DENSE_ATTENTION_NAME = "babydoctor_dense"
"""The same for ``dense_attention``, the vision tower's."""

QUERY_BLOCK = 128
"""Queries that the CPU treats at once. Keys after the block's last query are skipped, so smaller blocks save work,
and a block's scores stay in the cache; below 128 the matrix products become too small to run fast."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    document_lengths: Sequence[int],
    query_lengths: Sequence[int] | None = None,
    prefix_length: int = 0,
) -> torch.Tensor:
    """Causal attention inside each document, scaled by ``D ** -0.5``.

    Args:
        query: ``[Q, H, D]``.
        key, value: ``[T, K, D]``.
        document_lengths: lengths that sum to ``T - prefix_length``.
        query_lengths: how many of each document's last positions ask; they sum to ``Q``, and the prefix does not ask.
            None: all positions ask.
        prefix_length: first positions that every document sees.

    Returns:
        ``[Q, H, D]``.
    """
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    layout = lay_out(document_lengths, query_lengths, prefix_length)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        output = _varlen_attention(query, key, value, layout)
        if output is not None:
            return output
    output = _BlockAttention.apply(query, key, value, layout)
    assert isinstance(output, torch.Tensor)
    return output


@dataclass(frozen=True)
class Stretch:
    """Positions that ask one after the other, and what they see: the prefix, and keys up to their own position."""

    rows: slice
    shared: int
    """How many of the row's first positions are seen by all."""
    keys: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_keys(self) -> int:
        return self.shared + self.keys.stop - self.keys.start


def lay_out(
    document_lengths: Sequence[int], query_lengths: Sequence[int] | None, prefix_length: int
) -> tuple[Stretch, ...]:
    """One stretch for each document that asks, the prefix first; arguments as in ``attend``."""
    stretches = []
    first_row, first_key = 0, prefix_length
    if query_lengths is None:
        query_lengths = document_lengths
        if prefix_length:
            stretches.append(Stretch(slice(0, prefix_length), 0, slice(0, prefix_length)))
            first_row = prefix_length
    for length, asking in zip(document_lengths, query_lengths, strict=True):
        rows, keys = slice(first_row, first_row + asking), slice(first_key, first_key + length)
        stretches.append(Stretch(rows, prefix_length, keys))
        first_row, first_key = rows.stop, keys.stop
    return tuple(stretches)


class _BlockAttention(torch.autograd.Function):
    """Blocks of queries against the keys up to the block's end; the backward pass reuses the probabilities.

    Blocks of the same size are multiplied together, whatever document they are from: on two cores, eight documents at
    once reach twice the rate of one after the other. torch's own kernel for the CPU ran at a tenth of the matrix
    multiplication rate (bfloat16, 300 positions).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: tuple[Stretch, ...]
    ) -> torch.Tensor:
        q, k, v = (_by_head(x) for x in (query, key, value))
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        mask = _causal_strip(max((stretch.num_keys for stretch in layout), default=0), query)
        scale = query.shape[-1] ** -0.5
        keep = any(ctx.needs_input_grad)
        saved = []
        groups = _equal_blocks(layout)
        for (num_rows, num_keys), blocks in groups.items():
            end = mask.shape[1] - QUERY_BLOCK + num_rows
            scores = torch.baddbmm(
                mask[:num_rows, end - num_keys : end],
                _gather_rows(q, blocks),
                _gather_keys(k, blocks).transpose(1, 2),
                alpha=scale,
            )
            probabilities = torch.softmax(scores, dim=-1)
            mixed = torch.bmm(probabilities, _gather_keys(v, blocks))
            for block, part in zip(blocks, _split(mixed, blocks), strict=True):
                output[block.rows] = part.transpose(0, 1)
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
            grad_block = _gather_rows(grad, blocks)
            grad_p = torch.bmm(grad_block, _gather_keys(v, blocks).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            _add_keys(grad_v, blocks, torch.bmm(probabilities.transpose(1, 2), grad_block))
            _add_keys(grad_k, blocks, _scaled_bmm(grad_scores.transpose(1, 2), _gather_rows(q, blocks), scale))
            mixed = _scaled_bmm(grad_scores, _gather_keys(k, blocks), scale)
            for block, part in zip(blocks, _split(mixed, blocks), strict=True):
                grad_q[:, block.rows] = part
        return grad_q.transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1), None


def _equal_blocks(layout: Sequence[Stretch]) -> dict[tuple[int, int], list[Stretch]]:
    """The stretches cut into blocks of at most ``QUERY_BLOCK`` rows, by size (rows, keys up to the last row's own)."""
    groups: dict[tuple[int, int], list[Stretch]] = {}
    for stretch in layout:
        for start in range(0, stretch.num_rows, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, stretch.num_rows)
            rows = slice(stretch.rows.start + start, stretch.rows.start + stop)
            keys = slice(stretch.keys.start, stretch.keys.stop - stretch.num_rows + stop)
            block = Stretch(rows, stretch.shared, keys)
            groups.setdefault((block.num_rows, block.num_keys), []).append(block)
    return groups


def _scaled_bmm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * left @ right`` in one pass."""
    size = (left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(left.new_empty(()).expand(size), left, right, beta=0, alpha=scale)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[T, H, D]`` -> ``[H, T, D]`` with each head's positions side by side, as matrix products want them."""
    return x.transpose(0, 1).contiguous()


def _gather_rows(x: torch.Tensor, blocks: Sequence[Stretch]) -> torch.Tensor:
    """``[H, Q, D]`` -> ``[H * blocks, rows, D]``."""
    if len(blocks) == 1:
        return x[:, blocks[0].rows]
    pieces = torch.cat([x[:, block.rows] for block in blocks], dim=1)
    return pieces.view(-1, blocks[0].num_rows, x.shape[-1])


def _gather_keys(x: torch.Tensor, blocks: Sequence[Stretch]) -> torch.Tensor:
    """``[H, T, D]`` -> ``[H * blocks, keys, D]``: for each block the prefix and what it sees of its own document."""
    if len(blocks) == 1 and not blocks[0].shared:
        return x[:, blocks[0].keys]
    pieces = []
    for block in blocks:
        if block.shared:
            pieces.append(x[:, : block.shared])
        pieces.append(x[:, block.keys])
    return torch.cat(pieces, dim=1).view(-1, blocks[0].num_keys, x.shape[-1])


def _split(parts: torch.Tensor, blocks: Sequence[Stretch]) -> tuple[torch.Tensor, ...]:
    """``[H * blocks, n, D]`` -> ``[H, n, D]`` for each block."""
    return parts.unflatten(0, (-1, len(blocks))).unbind(1)


def _add_keys(total: torch.Tensor, blocks: Sequence[Stretch], parts: torch.Tensor) -> None:
    """Add ``parts`` ``[H * blocks, keys, D]`` to where ``_gather_keys`` took them from in ``total`` ``[H, T, D]``."""
    shared = blocks[0].shared
    if shared:
        total[:, :shared] += parts[:, :shared].unflatten(0, (-1, len(blocks))).sum(1)
    for block, part in zip(blocks, _split(parts, blocks), strict=True):
        total[:, block.keys] += part[:, shared:]


def _causal_strip(longest: int, like: torch.Tensor) -> torch.Tensor:
    """``[QUERY_BLOCK, longest + QUERY_BLOCK]``: zeros, and at the right end a causal triangle.

    A block of ``n`` queries against ``m`` keys finds its mask in the first ``n`` rows, in the ``m`` columns that end
    ``QUERY_BLOCK - n`` before the right edge.
    """
    strip = torch.zeros(QUERY_BLOCK, longest + QUERY_BLOCK, dtype=like.dtype, device=like.device)
    strip[:, longest:] = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, device=like.device).triu_(1)
    return strip


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Sequence[Stretch]
) -> torch.Tensor | None:
    """One variable-length kernel for all documents, where this torch has it; None otherwise.

    Its causal mask is aligned to the last query and the last key, which is what a document's tail needs. The kernel
    knows no shared keys, so each document gets a copy of the prefix's.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if any(stretch.shared for stretch in layout):
        index = key_index(layout).to(key.device, non_blocking=True)
        key, value = key.index_select(0, index), value.index_select(0, index)
    num_rows = [stretch.num_rows for stretch in layout]
    num_keys = [stretch.num_keys for stretch in layout]
    query_bounds, key_bounds = (
        torch.tensor((0, *lengths), dtype=torch.int32, device=query.device).cumsum(0, dtype=torch.int32)
        for lengths in (num_rows, num_keys)
    )
    causal: Any = {"window_size": (-1, 0)}
    q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
    output = varlen_attn(q, k, v, query_bounds, key_bounds, max(num_rows), max(num_keys), **causal)
    assert isinstance(output, torch.Tensor)
    return output


def key_index(layout: Sequence[Stretch]) -> torch.Tensor:
    """int64: the keys that each stretch sees, one stretch after the other."""
    pieces = []
    for stretch in layout:
        pieces += [torch.arange(stretch.shared), torch.arange(stretch.keys.start, stretch.keys.stop)]
    return torch.cat(pieces)


def register_attention() -> None:
    """Make ``packed_attention`` and ``dense_attention`` known to transformers. Calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    AttentionInterface.register(DENSE_ATTENTION_NAME, dense_attention)
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


def dense_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of all positions to all, as CLIP's layers call it: ``[B, H, T, D]`` -> ``[B, T, H, D]`` and None.

    On the CPU two matrix products with a softmax between take half as long as torch's kernel (257 positions,
    bfloat16); on CUDA, or with a mask or gradients, it is that kernel.
    """
    if query.is_cuda or attention_mask is not None or torch.is_grad_enabled():
        kwargs = {"is_causal": False} | kwargs
        return packed_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    probabilities = torch.softmax(_scaled_bmm(q, k.transpose(1, 2), scale), dim=-1)
    return torch.bmm(probabilities, v).unflatten(0, query.shape[:2]).transpose(1, 2), None
