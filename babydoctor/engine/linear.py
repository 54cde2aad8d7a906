"""Linear layers of the engine: fused, and on the CPU packed once into the layout that oneDNN multiplies fastest.

Measured on two AVX-512 cores in bfloat16: one row times ``[32000, 512]`` takes 1.8 ms with ``F.linear`` and 0.36 ms
packed, which is memory bandwidth. Sixteen rows times ``[1536, 512]`` take 131 µs and 77 µs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear, pad

from babydoctor.model.packed.lora_linear import base_layer, has_lora, scaled_lora

Linear = Callable[[torch.Tensor], torch.Tensor]
"""``[M, in] -> [M, out]``."""

ROWS_STEP = 32
"""See ``round_rows``."""

PACKING_ROWS = 16
"""Number of rows that oneDNN chooses the layout for. It is as fast for 1 and for 300 rows (measured)."""


def build_linear(modules: Sequence[nn.Module], dtype: torch.dtype, *, pack: bool, own: bool = False) -> Linear:
    """One function for linear modules with the same input. It concatenates their outputs, in ``dtype``.

    Plain ``nn.Linear`` modules of one dtype become one product. LoRA is added to the product of its base layers. Other
    modules (4-bit layers) are called unchanged. With ``pack`` the weights are copied into oneDNN's layout.

    With ``own`` the model belongs to the engine: its modules' weights are joined into one and become views of it, so
    one product serves them and no memory is used twice. Otherwise the model's storage is unchanged.
    """
    if any(has_lora(module) for module in modules):
        return build_lora_linear(modules, dtype, pack=pack, own=own)
    if any(type(module) is not nn.Linear for module in modules) or len({m.weight.dtype for m in modules}) > 1:
        if len(modules) == 1:
            return modules[0]
        return lambda rows: torch.cat([module(rows) for module in modules], dim=-1)
    plain = [module for module in modules if isinstance(module, nn.Linear)]
    bias: torch.Tensor | None = None
    if any(module.bias is not None for module in plain):
        bias = torch.cat([torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias.detach() for m in plain])
    if len(plain) > 1 and not (pack or own):
        parts = [(module.weight.detach(), module.bias) for module in plain]
        return lambda rows: torch.cat([linear(rows, weight, bias) for weight, bias in parts], dim=-1)
    weight = plain[0].weight.detach() if len(plain) == 1 else torch.cat([module.weight.detach() for module in plain])
    if pack:
        return build_packed_linear(weight, bias)
    if len(plain) > 1:
        for module, part in zip(plain, weight.split([len(module.weight) for module in plain]), strict=True):
            module.weight.data = part
    return lambda rows: linear(rows, weight, bias)


def build_lora_linear(modules: Sequence[nn.Module], dtype: torch.dtype, *, pack: bool, own: bool = False) -> Linear:
    """Like ``build_linear`` for modules of which some have a LoRA: the base product plus the low-rank products.

    LoRA weights are copied into ``dtype``, so a stage in training keeps its own in float32.
    """
    bases = [base_layer(module) for module in modules]
    multiply = build_linear(bases, dtype, pack=pack, own=own)
    parts: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
    end = 0
    for module, base in zip(modules, bases, strict=True):
        start, end = end, end + base.out_features
        if has_lora(module):
            down, up = scaled_lora(module)
            parts.append((start, end, down.to(dtype).T, up.to(dtype).T))

    def forward(rows: torch.Tensor) -> torch.Tensor:
        output = multiply(rows)
        for start, end, down, up in parts:
            output[:, start:end].addmm_(rows @ down, up)
        return output

    return forward


def round_rows(multiply: Linear) -> Linear:
    """Fill the rows of prompt chunks up to a multiple of ``ROWS_STEP``.

    oneDNN builds a kernel for each number of rows and keeps it. Measured in bfloat16 with the mini model and prompts of
    160 different lengths: without filling, kernels took 240 MiB more.
    """

    def forward(rows: torch.Tensor) -> torch.Tensor:
        missing = -len(rows) % ROWS_STEP if len(rows) > PACKING_ROWS else 0
        return multiply(pad(rows, (0, 0, 0, missing)))[: len(rows)] if missing else multiply(rows)

    return forward


def build_packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A linear layer over a copy of ``weight`` ``[out, in]`` in oneDNN's layout (the operators torch.compile uses)."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKING_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: multiply(rows, packed, bias, "none", [], "")


def packing_pays(weights: Sequence[torch.Tensor]) -> bool:
    """True if packing is faster and fits: a CPU with oneDNN, a dtype it multiplies, and memory for a second copy."""
    if not torch.backends.mkldnn.is_available():
        return False
    if any(weight.device.type != "cpu" for weight in weights):
        return False
    if not all(weight.dtype in (torch.float32, torch.bfloat16) for weight in weights):
        return False
    if any(weight.dtype == torch.bfloat16 for weight in weights) and not cpu_multiplies_bfloat16():
        return False
    return has_room_for_copy(weights)


def has_room_for_copy(weights: Iterable[torch.Tensor]) -> bool:
    """True if a second copy of the weights takes less than half of the memory that is available."""
    return sum(weight.numel() * weight.element_size() for weight in weights) < available_memory_bytes() // 2


def cpu_multiplies_bfloat16() -> bool:
    """True if oneDNN has bfloat16 products for this CPU (AVX-512 or newer)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def available_memory_bytes() -> int:
    """Memory of this machine that is available for new allocations."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
