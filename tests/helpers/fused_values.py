"""Values and gradients of the fused operations."""

from __future__ import annotations

import torch

from babydoctor.model.packed.fused_ops import ElementwiseOps
from helpers.packed_models import build_tiny


def values_and_gradients(
    ops: ElementwiseOps, length: int, dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """Outputs of all operations on random inputs, and the gradients of their sum."""
    norm = build_tiny().language_model.model.norm.to(device)
    generator = torch.Generator().manual_seed(length)
    x, y, seed = (torch.randn(length, 32, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
    angle = torch.rand(length, 4, generator=generator)
    cos, sin = (f(torch.cat((angle, angle), -1)).to(device, dtype) for f in (torch.cos, torch.sin))
    query, key = ((z * 1).view(-1, 4, 8) for z in (x, y))  # new tensors: Liger rotates in place
    outputs = [ops.swiglu(x, y), ops.rms_norm(x, norm)]
    outputs += [turned.flatten(1) for turned in ops.rotate_pair(query, key, cos, sin)]
    return [*outputs, *torch.autograd.grad(outputs, (x, y), [seed.detach()] * 4)]
