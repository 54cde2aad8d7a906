"""Linear modules packed into the blocks that ``product.h`` reads: bfloat16, int8 or NF4, and LoRAs beside them.

Shapes: ``O`` outputs, ``I`` inputs, ``B`` blocks of 64 outputs, the last one filled up with zeros, ``R`` the ranks of
all LoRAs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad

from babydoctor.engine.cpu.library import Operator, StepProduct, address
from babydoctor.model.nf4 import BLOCK_SIZE, block_scales, dequantized_weight, is_4bit
from babydoctor.model.packed.lora_linear import base_layer, effective_weight, has_lora, scaled_lora

BLOCK = 64
"""Outputs per block of packed weights."""

LANES = 16
"""Sizes must be multiples of this: the operator's vectors hold 16 numbers."""

ALIGNMENT = 64
"""Bytes of a cache line. A vector that crosses lines is read twice."""

QUANTIZED_ROWS = 1024
"""Rows of weights that are quantized together."""

Packed = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Weights, scales and sums of a ``Product`` of ``product.h``."""


class PackedProduct:
    """One product of the operator: bfloat16 ``[M, I] -> [M, O]``.

    Args:
        packed: of ``outputs`` times ``inputs`` weights.
        lora: its first product ``[M, I] -> [M, R]`` and its second ``[M, R] -> [M, O]``, which is added.
    """

    def __init__(
        self,
        operator: Operator,
        packed: Packed,
        outputs: int,
        inputs: int,
        lora: tuple[PackedProduct, PackedProduct] | None = None,
    ) -> None:
        self._operator = operator
        self._owners = (packed, lora)  # what the pointers point to
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in packed]
        lora_pointers = (None, None) if lora is None else [address(part.structure) for part in lora]
        self.structure: StepProduct = StepProduct(*pointers, outputs, inputs, *lora_pointers)
        self.rank = 0 if lora is None else lora[1].structure.inputs

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        output = rows.new_empty(len(rows), self.structure.outputs)
        pointers = (rows.data_ptr(), output.data_ptr())
        self._operator.multiply(self.structure, torch.get_num_threads(), len(rows), *pointers)
        return output


def build_product(operator: Operator, modules: Sequence[nn.Module], *, is_int8: bool = False) -> PackedProduct:
    """Pack linear modules with the same input as one product. Their outputs are concatenated.

    Args:
        modules: bfloat16 ``nn.Linear`` or 4-bit layers without biases, or peft LoRA layers over either.
        is_int8: merge the LoRAs, and round each output's weights to eight bits with a scale of their own.
    """
    bases = [base_layer(module) for module in modules]
    outputs, inputs = sum(base.out_features for base in bases), bases[0].in_features
    if is_int8:
        merged = torch.cat([effective_weight(module, torch.bfloat16) for module in modules])
        return PackedProduct(operator, _pack_int8(merged), outputs, inputs)
    if all(_is_nf4(base) for base in bases):
        packed = _pack_nf4(bases)
    else:
        packed = _pack_bfloat16(torch.cat([dequantized_weight(base).to(torch.bfloat16) for base in bases]))
    return PackedProduct(operator, packed, outputs, inputs, _build_lora(operator, modules, bases))


def _build_lora(
    operator: Operator, modules: Sequence[Any], bases: Sequence[Any]
) -> tuple[PackedProduct, PackedProduct] | None:
    """The two products of the modules' LoRAs; None without a LoRA. ``R`` is filled up with zeros."""
    downs, ups = [], []
    for module, base in zip(modules, bases, strict=True):
        if has_lora(module):
            down, up = scaled_lora(module)
            downs.append(down)
            ups.append(up)
        else:
            ups.append(base.weight.new_empty(base.out_features, 0, dtype=torch.float32))
    if not downs:
        return None
    down = torch.cat(downs)  # [R, I]
    up = torch.block_diag(*ups)  # [O, R]
    fill = -len(down) % LANES
    parts = (pad(down, (0, 0, 0, fill)), pad(up, (0, fill)))
    first, second = (PackedProduct(operator, _pack_bfloat16(part.to(torch.bfloat16)), *part.shape) for part in parts)
    return first, second


def _pack_bfloat16(weight: torch.Tensor) -> Packed:
    return _pack_blocks(_fill_block(weight.detach()), 2), None, None


def _pack_int8(weight: torch.Tensor) -> Packed:
    filled = _fill_block(weight.detach())
    scales = (filled.abs().amax(1).float() / 127).clamp_min(1e-12)
    # Block by block, because a whole product in float32 takes four times the memory of the result.
    blocks = zip(filled.split(QUANTIZED_ROWS), scales.split(QUANTIZED_ROWS), strict=True)
    rounded = torch.cat([(rows.float() / scale[:, None]).round().to(torch.int8) for rows, scale in blocks])
    return _pack_blocks(rounded, 4), scales, rounded.sum(1, dtype=torch.int32)


def _is_nf4(layer: Any) -> bool:
    """True if a layer's weights are NF4 in blocks that do not cross outputs. Others are dequantized once."""
    if not is_4bit(layer):
        return False
    state = layer.weight.quant_state
    return state.quant_type == "nf4" and state.blocksize == BLOCK_SIZE and layer.in_features % BLOCK_SIZE == 0


def _pack_nf4(layers: Sequence[Any]) -> Packed:
    inputs = layers[0].in_features
    codes = torch.cat([layer.weight.data.view(torch.uint8).view(-1, inputs // 2) for layer in layers])  # [O, I / 2]
    # A byte has the code of an even input in its upper half and the next input's in the lower. Four bytes become a word
    # with the codes of even inputs in its first two bytes and of odd inputs in the others, each time the lower first.
    halves = torch.stack((codes >> 4, codes & 15)).view(2, len(codes), -1, 2, 2)  # [2, O, I / 8, 2, 2]
    words = (halves[..., 0] | (halves[..., 1] << 4)).permute(1, 2, 0, 3).reshape(len(codes), -1)  # [O, I / 2]
    scales = torch.cat([block_scales(layer).view(-1, inputs // BLOCK_SIZE) for layer in layers])
    return _pack_blocks(_fill_block(words), 4), _pack_blocks(_fill_block(scales), 1), None


def _fill_block(rows: torch.Tensor) -> torch.Tensor:
    """Add rows of zeros up to a whole block: ``[O, N] -> [B * 64, N]``."""
    return pad(rows, (0, 0, 0, -len(rows) % BLOCK))


def _pack_blocks(rows: torch.Tensor, group: int) -> torch.Tensor:
    """``[B * 64, N] -> [B, N / group, 64, group]``, in huge pages where the system has them.

    NumPy requests huge pages for large arrays, so nothing has to be moved into them later; see
    ``runtime.use_huge_pages``, which moves 8 GiB at most.
    """
    blocks = rows.view(-1, BLOCK, rows.shape[1] // group, group).transpose(1, 2)
    memory = torch.from_numpy(np.empty(blocks.nbytes + ALIGNMENT, np.uint8))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + blocks.nbytes].view(blocks.dtype).view(blocks.shape).copy_(blocks)
