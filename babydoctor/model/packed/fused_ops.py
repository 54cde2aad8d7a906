"""Fused elementwise operations between the matrix products of a training step, with their backward passes.

Run separately, each operation reads and writes all of its tensors. On a processor with fast matrix units this takes
longer than the matrix products. So consecutive operations become one kernel: compiled by torch on the CPU, and Liger
Kernel's Triton kernels on CUDA (``liger_ops.py``).

Shapes: ``T`` tokens, ``H`` heads, ``D`` head size, ``I`` feed-forward size.

Source: RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu


class ElementwiseOps:
    """The operations of one model in plain PyTorch or, with ``compiled``, as fused kernels.

    A kernel is compiled on its first use. All of them together take about ten seconds, or one second if they are in
    torch's cache from an earlier run.

    Raises:
        RuntimeError: torch.compile does not work here; on the CPU it needs a C++ compiler.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        if compiled:
            _check_compiler()
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = _Kernels if compiled else _unchanged
        self.compiled = compiled
        self.normalize, self.normalize_back = wrap(_normalize), wrap(_normalize_back)
        self.gate, self.gate_back = wrap(_gate), wrap(_gate_back)
        self.turn = wrap(_turn_at_once) if compiled else _turn_in_passes
        self.masked, self.add_masked = wrap(_masked), wrap(_add_masked)

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """``x / rms(x) * weight`` over the last dimension, with a float32 mean, like transformers' ``LlamaRMSNorm``."""
        module: Any = norm
        return _RMSNorm.apply(x, module.weight.to(x.dtype), module.variance_epsilon, self)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up``, ``[T, I]``."""
        return _SwiGLU.apply(gate, up, self)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``[T, H, D]`` with ``cos`` and ``sin`` ``[T, D]``; ``i`` pairs with ``i + D/2``."""
        return _Rotate.apply(x, cos, sin, self)

    def rotate_pair(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rotate`` of queries and keys of the same tokens."""
        return self.rotate(query, cos, sin), self.rotate(key, cos, sin)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@functools.cache
def _check_compiler() -> None:
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(16))
    except Exception as error:
        raise RuntimeError(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}") from error


class _Kernels:
    """A function of tensors, compiled to one kernel for each combination of widths and memory layouts.

    In tensors with two or more dimensions the first one is the number of tokens, the only size that may change. The
    code that torch.compile generates, and its rounding, also depend on the first sizes that it sees. So kernels are
    compiled for dummy inputs of a fixed size, not for the first real batch, and a resumed run gets bitwise-identical
    kernels. Each kernel is compiled from a new function object, because torch caches by function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Any = function
        self.kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        # Detached, because a kernel would be compiled again for tensors that require gradients.
        args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        key = tuple(_kind(arg) for arg in args)
        if key not in self.kernels:
            self.kernels[key] = self._compile(args)
        return self.kernels[key](*args)

    def _compile(self, args: Sequence[Any]) -> Callable[..., Any]:
        function = self.function
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        kernel = torch.compile(own)
        kernel(*(_dummy(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        return kernel


_NUM_DUMMY_TOKENS = 1000


def _kind(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.dtype, arg.device, arg.shape[arg.dim() > 1 :], _order(arg)


def _order(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions sorted by stride, largest first."""
    strides: tuple[int, ...] = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda dim: -strides[dim]))


def _dummy(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 1:
        return torch.zeros_like(x)
    made = torch.empty_permuted((_NUM_DUMMY_TOKENS, *x.shape[1:]), _order(x), dtype=x.dtype, device=x.device).zero_()
    torch._dynamo.mark_dynamic(made, 0)
    return made


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, ops: ElementwiseOps) -> torch.Tensor:
        normed, inverse = ops.normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.ops = ops
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.ops.normalize_back(grad, *ctx.saved_tensors), None, None, None


def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight, inverse


def _normalize_back(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    grad = grad * weight
    along = (x * grad).sum(-1, keepdim=True, dtype=torch.float32) / x.shape[-1]
    return torch.addcmul(grad, x, (along * inverse.square()).to(x.dtype), value=-1) * inverse.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs and recomputes ``silu(gate)`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, ops: ElementwiseOps) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.ops = ops
        return ops.gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.ops.gate_back(grad, *ctx.saved_tensors), None


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate).mul_(up)


def _gate_back(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, ops: ElementwiseOps) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.ops = ops
        # Attention on the CPU multiplies per head, so the tokens of a head should be contiguous.
        return ops.turn(x, cos, sin, 1, not x.is_cuda)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.ops.turn(grad, *ctx.saved_tensors, -1, False), None, None, None


def _turn_in_passes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, by_head: bool) -> torch.Tensor:
    """Rotate ``x`` by its angle (``sign`` 1) or back (-1) in three passes. With ``by_head``, memory is ``[H, T, D]``.

    torch.compile generates slow code for the writes into halves. Without it ``_turn_at_once`` is slow.
    """
    shape = (x.shape[1], x.shape[0], x.shape[2]) if by_head else x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    out = out.transpose(0, 1) if by_head else out
    half = x.shape[-1] // 2
    sin = sin[:, None, :half]
    torch.mul(x, cos[:, None], out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


def _turn_at_once(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, by_head: bool) -> torch.Tensor:
    """``_turn_in_passes`` as a single expression, for torch.compile."""
    half = x.shape[-1] // 2
    first, second = x.unflatten(-1, (2, half)).unbind(-2)
    cos, sin = cos[:, None, :half], sign * sin[:, None, :half]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2).flatten(-2)
    return turned.transpose(0, 1).contiguous().transpose(0, 1) if by_head else turned.contiguous()


def _masked(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``x`` where ``keep`` (uint8, of the same shape) is 1, else 0. Not for autograd."""
    return x * keep


def _add_masked(total: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``total`` plus ``x`` where ``keep`` is 1. Not for autograd, because it may overwrite ``total`` and ``x``."""
    return total.add_(x.mul_(keep))


PLAIN_OPS = ElementwiseOps()
"""Plain PyTorch without compilation."""
