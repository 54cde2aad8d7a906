"""Attention over packed documents.

Shapes: ``H`` query heads, ``K`` key/value heads, ``T`` tokens of all documents end to end, ``Q`` query rows, ``D`` head
size.

A packed micro-batch is one row of ``T`` tokens. Each document attends only to itself, so attention is computed document
by document. The cost is the sum of the squared lengths, not the square of their sum, and no ``T x T`` mask is built. On
CUDA one variable-length kernel computes all documents. The CPU computes blocks of queries.

A prefix shared by all documents may be stored once, at the beginning. It attends to itself, and every document attends
to the prefix and to itself. ``data/layout.py`` describes which rows see which keys.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from babydoctor.data.layout import AttentionLayout, SharedKeys, Span

QUERY_BLOCK = 128
"""Query rows per block on the CPU. Keys after the block's last query are skipped, so smaller blocks save work and keep
their scores in the cache. Below 128 rows the matrix products become too small to run fast."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, window: int | None = None
) -> torch.Tensor:
    """Causal attention inside each document, scaled by ``D ** -0.5``.

    Args:
        query: ``[Q, H, D]``.
        key, value: ``[T, K, D]``.
        layout: which rows see which keys; on the device of the tensors.
        window: how many of these keys a row sees, counted back from its own; None: all.

    Returns:
        ``[Q, H, D]``.
    """
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if not query.is_cuda:
        output = _BlockAttention.apply(query, key, value, layout.spans, window)
        assert isinstance(output, torch.Tensor)
        return output
    if query.dtype in (torch.bfloat16, torch.float16) and _has_varlen_kernel(window is not None):
        return _varlen_attention(query, key, value, layout, window)
    return span_attention(query, key, value, layout.spans, window)


class _BlockAttention(torch.autograd.Function):
    """Blocks of queries against the keys up to the block's end; the backward pass reuses the probabilities.

    Blocks of equal size are computed in one batched product, also if they belong to different documents. On two cores,
    eight documents at once reach twice the rate of one at a time. torch's CPU kernel reached a tenth of the matrix
    product rate (bfloat16, 300 tokens).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: tuple[Span, ...],
        window: int | None,
    ) -> torch.Tensor:
        q, k, v = (_by_head(x) for x in (query, key, value))
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        mask = _causal_strip(max((span.num_keys for span in spans), default=0), query, window)
        scale = query.shape[-1] ** -0.5
        keep = any(ctx.needs_input_grad)
        saved = []
        groups = _equal_blocks(spans)
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
            _add_keys(grad_k, blocks, scaled_bmm(grad_scores.transpose(1, 2), _gather_rows(q, blocks), scale))
            mixed = scaled_bmm(grad_scores, _gather_keys(k, blocks), scale)
            for block, part in zip(blocks, _split(mixed, blocks), strict=True):
                grad_q[:, block.rows] = part
        return grad_q.transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1), None, None


def _equal_blocks(spans: Sequence[Span]) -> dict[tuple[int, int], list[Span]]:
    """Split the spans into blocks of up to ``QUERY_BLOCK`` rows, grouped by size: (rows, keys of the last row)."""
    groups: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        for start in range(0, span.num_rows, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, span.num_rows)
            rows = slice(span.rows.start + start, span.rows.start + stop)
            keys = slice(span.keys.start, span.keys.stop - span.num_rows + stop)
            block = Span(rows, span.shared, keys)
            groups.setdefault((block.num_rows, block.num_keys), []).append(block)
    return groups


def scaled_bmm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * left @ right`` in one pass."""
    size = (left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(left.new_empty(()).expand(size), left, right, beta=0, alpha=scale)


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """``[T, H, D]`` -> ``[H, T, D]``, contiguous for each head, as batched matrix products need it."""
    return x.transpose(0, 1).contiguous()


def _gather_rows(x: torch.Tensor, blocks: Sequence[Span]) -> torch.Tensor:
    """``[H, Q, D]`` -> ``[H * blocks, rows, D]``."""
    if len(blocks) == 1:
        return x[:, blocks[0].rows]
    pieces = torch.cat([x[:, block.rows] for block in blocks], dim=1)
    return pieces.view(-1, blocks[0].num_rows, x.shape[-1])


def _gather_keys(x: torch.Tensor, blocks: Sequence[Span]) -> torch.Tensor:
    """``[H, T, D]`` -> ``[H * blocks, keys, D]``: for each block the shared prefix and the keys of its own document."""
    if len(blocks) == 1 and not blocks[0].shared:
        return x[:, blocks[0].keys]
    pieces = []
    for block in blocks:
        if block.shared:
            pieces.append(x[:, : block.shared])
        pieces.append(x[:, block.keys])
    return torch.cat(pieces, dim=1).view(-1, blocks[0].num_keys, x.shape[-1])


def _split(parts: torch.Tensor, blocks: Sequence[Span]) -> tuple[torch.Tensor, ...]:
    """``[H * blocks, n, D]`` -> ``[H, n, D]`` for each block."""
    return parts.unflatten(0, (-1, len(blocks))).unbind(1)


def _add_keys(total: torch.Tensor, blocks: Sequence[Span], parts: torch.Tensor) -> None:
    """Reverse of ``_gather_keys``: add ``parts`` ``[H * blocks, keys, D]`` to their keys in ``total`` ``[H, T, D]``."""
    shared = blocks[0].shared
    if shared:
        total[:, :shared] += parts[:, :shared].unflatten(0, (-1, len(blocks))).sum(1)
    for block, part in zip(blocks, _split(parts, blocks), strict=True):
        total[:, block.keys] += part[:, shared:]


def _causal_strip(longest: int, like: torch.Tensor, window: int | None) -> torch.Tensor:
    """A mask ``[QUERY_BLOCK, longest + QUERY_BLOCK]`` of zeros with a causal triangle at the right end.

    The mask of a block of ``n`` queries and ``m`` keys is in the first ``n`` rows and in the ``m`` columns that end
    ``QUERY_BLOCK - n`` before the right edge. Row ``r``'s own key is in column ``longest + r``.
    """
    strip = torch.zeros(QUERY_BLOCK, longest + QUERY_BLOCK, dtype=like.dtype, device=like.device)
    strip[:, longest:] = torch.full((QUERY_BLOCK, QUERY_BLOCK), -torch.inf, device=like.device).triu_(1)
    if window is not None:
        strip.masked_fill_(torch.ones_like(strip, dtype=torch.bool).tril_(longest - window), -torch.inf)
    return strip


@functools.cache
def _varlen_kernel() -> tuple[Callable[..., Any], str] | None:
    """torch's variable-length attention and the argument that makes it causal; None if torch does not have it.

    Torch 2.10 takes ``is_causal``, later releases take ``window_size``. Both align the last query with the last key.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    return next(((varlen_attn, name) for name in ("window_size", "is_causal") if name in parameters), None)


@functools.cache
def _has_varlen_kernel(windowed: bool = False) -> bool:
    """True if the variable-length kernel runs here, with a sliding window if asked. It needs Ampere or newer."""
    kernel = _varlen_kernel()
    if kernel is None or (windowed and kernel[1] != "window_size"):
        return False
    # Without a GPU only fake tensors reach this line.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def _varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, window: int | None = None
) -> torch.Tensor:
    """One variable-length kernel for all documents. It does not support shared keys, so each document gets a copy."""
    kernel = _varlen_kernel()
    assert kernel is not None and layout.query_bounds is not None
    varlen_attn, name = kernel
    earlier = -1 if window is None else window - 1
    causal: dict[str, Any] = {"window_size": (earlier, 0)} if name == "window_size" else {"is_causal": True}
    if layout.shared is not None:
        key, value = (_CopyPrefix.apply(x, layout.shared) for x in (key, value))
    output = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.query_bounds,
        layout.key_bounds,
        layout.max_rows,
        layout.max_keys,
        **causal,
    )
    assert isinstance(output, torch.Tensor)
    return output


class _CopyPrefix(torch.autograd.Function):
    """``[T, H, D]`` -> ``[L, H, D]``: the keys of each span, with a copy of the shared prefix for each span that sees
    it.

    The backward pass gathers and sums. Autograd would use ``index_add_``, which is slower and adds in random order, so
    a resumed run would round differently.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shared: SharedKeys) -> torch.Tensor:
        ctx.shared = shared
        return x.index_select(0, shared.gather)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        shared: SharedKeys = ctx.shared
        copies = grad.index_select(0, shared.copies).unflatten(0, (-1, shared.prefix_length))  # [C, prefix, H, D]
        return torch.cat([copies.sum(0), grad.index_select(0, shared.own)]), None


def span_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span], window: int | None = None
) -> torch.Tensor:
    """torch's kernel for one span at a time. Used on GPUs without the variable-length kernel."""
    from torch.nn.attention.bias import causal_lower_right

    outputs = []
    for span in spans:
        q = query[span.rows]
        k, v = (torch.cat([x[: span.shared], x[span.keys]]) if span.shared else x[span.keys] for x in (key, value))
        mask: Any = causal_lower_right(len(q), len(k))
        if window is not None:
            seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril_(len(k) - len(q))
            mask = seen.triu_(len(k) - len(q) - window + 1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, rows, D]
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(query)
