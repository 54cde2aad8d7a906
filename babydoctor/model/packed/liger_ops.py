"""The fused operations on CUDA, with Liger Kernel's Triton kernels (Hsu et al. 2024).

Liger's RMSNorm and SwiGLU keep the same tensors for the backward pass as those of ``fused_ops.py``. Its rotary
embedding works in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from babydoctor.model.packed.fused_ops import ElementwiseOps


class LigerOps(ElementwiseOps):
    """Liger's kernels. Dropout masks are applied by kernels that torch compiles.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: torch.compile does not work here.
    """

    def __init__(self, *, compiled: bool = True) -> None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        super().__init__(compiled=compiled)
        self._rms_norm: Any = LigerRMSNormFunction
        self._swiglu: Any = LigerSiLUMulFunction
        self._rope: Any = LigerRopeFunction

    def rms_norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        module: Any = norm
        # Not in place, because the incoming gradient is also used by the residual stream.
        normed: torch.Tensor = self._rms_norm.apply(
            x, module.weight.to(x.dtype), module.variance_epsilon, 0.0, "llama", False
        )
        return normed

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._swiglu.apply(gate, up)
        return product

    def rotate_pair(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Liger takes [1, H, T, D] and transposes it to [1, T, H, D], the memory layout of these tensors.
        heads_first = (x.transpose(0, 1)[None] for x in (query, key))
        query, key = self._rope.apply(*heads_first, cos[None], sin[None])
        return query[0].transpose(0, 1), key[0].transpose(0, 1)
