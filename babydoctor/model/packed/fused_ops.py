"""The chains of elementwise operations between a training step's matrix products, each with its backward pass.

Run one by one, every operation of a chain reads and writes all of its tensors: on a processor with fast matrix units
they take longer than the products between them. ``fuse`` makes torch.compile turn each chain into one kernel.

Shapes: ``T`` positions, ``H`` heads, ``D`` head width, ``I`` width of the feed-forward layer.

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

_state = {"fused": False}
"""Of the process, as torch's number of threads is."""


def fuse(enabled: bool = True) -> None:
    """Run the chains of this process as compiled kernels, or one operation after the other.

    A kernel is compiled when it is first used; all of them take about ten seconds, and a second where torch still has
    them from an earlier run.

    Raises:
        RuntimeError: torch.compile does not work here; on the CPU it needs a C++ compiler.
    """
    if enabled:
        _check_compiler()
    _state["fused"] = enabled


@functools.cache
def _check_compiler() -> None:
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(16))
    except Exception as error:
        raise RuntimeError(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}") from error


class _Chain:
    """A function of tensors that fuses to one kernel for each combination of widths and layouts.

    Tensors of two and more dimensions have the positions first; their number is all that may change under a kernel.
    What torch.compile makes also depends on the sizes that it sees first, down to the rounding. So that a run that is
    resumed computes what one that went through computed, it is shown stand-ins of ``_STAND_IN`` positions, never a
    batch, and a function of its own each time, since functions remember what they were compiled for.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function: Any = function
        self.kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        if not _state["fused"]:
            return self.function(*args)
        # Detached: a kernel knows nothing of autograd, and would be compiled again for tensors with gradients.
        args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
        key = tuple(_kind(arg) for arg in args)
        if key not in self.kernels:
            self.kernels[key] = self._compile(args)
        return self.kernels[key](*args)

    def _compile(self, args: Sequence[Any]) -> Callable[..., Any]:
        function = self.function
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        kernel = torch.compile(own)
        kernel(*(_stand_in(arg) if isinstance(arg, torch.Tensor) else arg for arg in args))
        return kernel


_STAND_IN = 1000


def _kind(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    return arg.dtype, arg.device, arg.shape[arg.dim() > 1 :], _order(arg)


def _order(x: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the one whose elements lie farthest apart to the one whose lie side by side."""
    strides: tuple[int, ...] = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda dim: -strides[dim]))


def _stand_in(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 1:
        return torch.zeros_like(x)
    made = torch.empty_permuted((_STAND_IN, *x.shape[1:]), _order(x), dtype=x.dtype, device=x.device).zero_()
    torch._dynamo.mark_dynamic(made, 0)
    return made


def rms_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, the mean in float32, as transformers' ``LlamaRMSNorm``."""
    module: Any = norm
    return _RMSNorm.apply(x, module.weight.to(x.dtype), module.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _normalize_back(grad, *ctx.saved_tensors), None, None


@_Chain
def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight, inverse


@_Chain
def _normalize_back(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    grad = grad * weight
    along = (x * grad).sum(-1, keepdim=True, dtype=torch.float32) / x.shape[-1]
    return torch.addcmul(grad, x, (along * inverse.square()).to(x.dtype), value=-1) * inverse.to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, ``[T, I]``."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs; ``silu(gate)`` is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gate(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _gate_back(grad, *ctx.saved_tensors)


@_Chain
def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate).mul_(up)


@_Chain
def _gate_back(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of ``[T, H, D]`` with ``cos`` and ``sin`` ``[T, D]``; halves form the pairs."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, forward=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, forward=False), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, forward: bool) -> torch.Tensor:
    """``x`` turned by its angle, or back.

    The CPU's attention multiplies head by head, so a head's positions stand side by side in what goes to it.
    """
    by_head, sign = forward and not x.is_cuda, 1 if forward else -1
    if _state["fused"]:
        return _turned(x, cos, sin, sign, by_head)
    return _turn_into(_empty(x, by_head), x, cos, sin, sign)


def _empty(x: torch.Tensor, by_head: bool) -> torch.Tensor:
    if not by_head:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device).transpose(0, 1)


def _turn_into(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """In three passes; a compiler makes slow code of the writing into halves, and ``_turned`` is slow without one."""
    half = x.shape[-1] // 2
    sin = sin[:, None, :half]
    torch.mul(x, cos[:, None], out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out


@_Chain
def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int, by_head: bool) -> torch.Tensor:
    half = x.shape[-1] // 2
    first, second = x.unflatten(-1, (2, half)).unbind(-2)
    cos, sin = cos[:, None, :half], sign * sin[:, None, :half]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -2).flatten(-2)
    return turned.transpose(0, 1).contiguous().transpose(0, 1) if by_head else turned.contiguous()


@_Chain
def masked(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``x`` where ``keep`` (uint8, of the same shape) is 1, else 0. Not for autograd."""
    return x * keep


@_Chain
def add_masked(total: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """``total`` plus ``x`` where ``keep`` is 1. Not for autograd; ``total`` and ``x`` may be used up."""
    return total.add_(x.mul_(keep))
