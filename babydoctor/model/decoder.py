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
from torch.nn.functional import silu

from babydoctor.model.attention import attend
from babydoctor.model.linear import apply_linears


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


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, the mean in float32, as transformers' ``LlamaRMSNorm``."""
    module: Any = norm
    return _RMSNorm.apply(x, module.weight.to(x.dtype), module.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad * weight
        along = (x * grad).sum(-1, keepdim=True, dtype=torch.float32) / x.shape[-1]
        return (
            torch.addcmul(grad, x, (along * inverse.square()).to(x.dtype), value=-1) * inverse.to(x.dtype),
            None,
            None,
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[T, H, D]`` with ``cos`` and ``sin`` ``[T, D]``; halves form the pairs."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        if x.is_cuda:
            return _rotate_into(torch.empty_like(x), x, cos, sin, 1)
        # The CPU's attention multiplies head by head, so a head's positions stand side by side there.
        by_head = torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)
        return _rotate_into(by_head.transpose(0, 1), x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        return _rotate_into(out, grad, cos, sin, -1), None, None


def _rotate_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """``x`` turned by its angle (``sign`` 1) or back (-1)."""
    half = x.shape[-1] // 2
    sin = sin[:, None, :half]
    torch.mul(x, cos[:, None], out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, ``[T, I]``."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs; ``silu(gate)`` is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)
