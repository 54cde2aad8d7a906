"""Linear layers that share an input, as one operation. Each has a frozen base (plain or 4-bit) and optionally a LoRA.

Shapes: ``T`` tokens, ``I`` input size, ``O`` output size, ``r`` LoRA rank.

Autograd on peft's layers keeps one input after dropout per layer and a bfloat16 copy of each LoRA weight, and adds
gradients in separate passes. Here all layers that read the same input share one input after dropout, LoRA products
accumulate into the output of the base, and bfloat16 copies exist only while they are used.

Source: LoRA (Hu et al. 2021), ``y = x W' + alpha / r * dropout(x) A' B'``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from babydoctor.model.nf4 import dequantized_weight, is_4bit
from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps

ADAPTER = "default"
"""peft's name of the only adapter."""


@dataclass(frozen=True)
class _Layer:
    """A base layer and the scale of its LoRA: alpha / r, times dropout's 1 / (1 - p). 0 without a LoRA."""

    base: nn.Module
    scale: float = 0.0

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``[O, I]``. A 4-bit weight is dequantized in each call, so that no float copy is kept."""
        return dequantized_weight(self.base).to(dtype)


def apply_linears(
    x: torch.Tensor, modules: Sequence[nn.Module], ops: ElementwiseOps = PLAIN_OPS
) -> tuple[torch.Tensor, ...]:
    """Apply each module to the same input.

    Args:
        x: ``[T, I]`` in the dtype to compute in.
        modules: ``nn.Linear``, bitsandbytes 4-bit layers, or peft LoRA layers over either. Everything but the LoRA is
            frozen. All LoRA layers share one dropout mask.

    Returns:
        One ``[T, O]`` per module.
    """
    layers, factors = [], []
    dropout = max((_dropout(module) for module in modules), default=0.0)
    for module in modules:
        if has_lora(module):
            peft_layer: Any = module
            layers.append(_Layer(peft_layer.base_layer, peft_layer.scaling[ADAPTER] / (1 - dropout)))
            factors += [peft_layer.lora_A[ADAPTER].weight, peft_layer.lora_B[ADAPTER].weight]
        else:
            layers.append(_Layer(module))
    if not factors and not any(is_4bit(layer.base) or _is_gathered(layer.base) for layer in layers):
        return tuple(linear(x, layer.weight(x.dtype), _bias(layer.base, x)) for layer in layers)
    keep = draw_keep_mask(x.shape, dropout, x.device) if dropout else None
    return _FrozenLinears.apply(x, keep, tuple(layers), ops, *factors)


class _FrozenLinears(torch.autograd.Function):
    """Keeps the input after dropout (only if there is a LoRA), the mask and the low-rank products for the backward
    pass.

    Weights are not kept, because a 4-bit base would need a float copy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        keep: torch.Tensor | None,
        layers: tuple[_Layer, ...],
        ops: ElementwiseOps,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        dropped = x if keep is None else ops.masked(x, keep)
        remaining = list(factors)
        outputs, lows = [], []
        for layer in layers:
            output = linear(x, layer.weight(x.dtype), _bias(layer.base, x))
            if layer.scale:
                down, up = (remaining.pop(0).to(x.dtype) for _ in range(2))
                low = dropped @ down.T
                output.addmm_(low, up.T, alpha=layer.scale)
                lows.append(low)
            outputs.append(output)
        ctx.layers, ctx.ops = layers, ops
        ctx.num_factors = len(factors)
        ctx.save_for_backward(dropped if factors else None, keep, *factors, *lows)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, keep, *rest = ctx.saved_tensors
        factors, lows = rest[: ctx.num_factors], rest[ctx.num_factors :]
        grad_x: torch.Tensor | None = None
        grad_dropped: torch.Tensor | None = None
        grad_factors: list[torch.Tensor] = []
        for layer, grad in zip(ctx.layers, grads, strict=True):
            if ctx.needs_input_grad[0]:
                grad_x = _accumulate(grad_x, grad, layer.weight(grad.dtype))
            if layer.scale:
                down, up = (factors[len(grad_factors) + side].to(grad.dtype) for side in range(2))
                grad_low = (grad @ up).mul_(layer.scale)
                grad_up = (grad.T @ lows[len(grad_factors) // 2]).float().mul_(layer.scale)
                grad_factors += [(grad_low.T @ dropped).float(), grad_up]
                if ctx.needs_input_grad[0]:
                    grad_dropped = _accumulate(grad_dropped, grad_low, down)
        if grad_x is not None and grad_dropped is not None:
            grad_x = grad_x.add_(grad_dropped) if keep is None else ctx.ops.add_masked(grad_x, grad_dropped, keep)
        return grad_x, None, None, None, *grad_factors


def _accumulate(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right if total is None else total.addmm_(left, right)


def draw_keep_mask(shape: Sequence[int], dropout: float, device: torch.device) -> torch.Tensor:
    """Draw a uint8 mask that is 0 with probability ``dropout``, else 1, from torch's global generator of the device.

    On the CPU that generator seeds NumPy's SFC64, and each of its 64-bit numbers gives four elements. This is fifteen
    times as fast as ``bernoulli_``. The probability is exact to 1 / 65,536.
    """
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=torch.uint8, device=device).bernoulli_(1 - dropout)
    size = math.prod(shape)
    seed = int(torch.randint(2**63 - 1, ()))
    draws = np.random.SFC64(seed).random_raw(-(-size // 4)).view(np.int16)[:size]
    keep = torch.empty(size, dtype=torch.bool)
    np.greater_equal(draws, round(dropout * 65536) - 32768, out=keep.numpy())
    return keep.view(torch.uint8).view(tuple(shape))


def _is_gathered(base: nn.Module) -> bool:
    """True if ZeRO-3 holds the weight only during the layer's passes; autograd must not keep it in between."""
    return hasattr(base.weight, "ds_id")


def effective_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[O, I]`` of a layer with its LoRA merged into it, in ``dtype``. Not copied where it exists."""
    if not has_lora(module):
        return dequantized_weight(module).to(dtype)
    peft_layer: Any = module
    down, up = peft_layer.lora_A[ADAPTER].weight.detach(), peft_layer.lora_B[ADAPTER].weight.detach()
    weight = dequantized_weight(base_layer(module)).float()
    return weight.addmm(up.float(), down.float(), alpha=peft_layer.scaling[ADAPTER]).to(dtype)


def base_layer(module: nn.Module) -> Any:
    """The layer under the module's LoRA; the module itself without one."""
    return module.base_layer if has_lora(module) else module


def scaled_lora(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """``A`` ``[r, I]`` and ``alpha / r * B`` ``[O, r]`` of a layer with a LoRA, in their own dtype."""
    peft_layer: Any = module
    down, up = peft_layer.lora_A[ADAPTER].weight.detach(), peft_layer.lora_B[ADAPTER].weight.detach()
    return down, up * peft_layer.scaling[ADAPTER]


def has_lora(module: nn.Module) -> bool:
    """True if the module is a peft LoRA layer and its adapter is active."""
    if not hasattr(module, "lora_A"):
        return False
    peft_layer: Any = module
    active = ADAPTER in peft_layer.active_adapters and not peft_layer.disable_adapters
    assert not peft_layer.merged, "peft has merged this LoRA into its base"
    return active


def _dropout(module: nn.Module) -> float:
    """The LoRA's dropout probability; 0 in evaluation and without a LoRA."""
    if not has_lora(module) or not module.training:
        return 0.0
    return float(getattr(module.lora_dropout[ADAPTER], "p", 0.0))  # type: ignore[index]


def _bias(base: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    bias = getattr(base, "bias", None)
    return None if bias is None else bias.to(x.dtype)
