"""4-bit weights: bitsandbytes' NF4 layers, and a faster way to quantize a weight on the CPU.

Only the linear layers of the language model's decoder are quantized; see ``language_model.is_decoder_linear``.

Source: QLoRA with NF4 and double quantization (Dettmers et al. 2023).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from babydoctor.schema import UserError

BLOCK_SIZE = 64
"""Number of weights that share one scale."""

_CHUNK = 2**17
"""Number of weights that a thread quantizes at a time. Its buffers must fit in the L2 cache."""


@dataclass(frozen=True)
class Quantization:
    """NF4 in blocks of 64 for the linear layers of the decoder. ``double`` also quantizes the scales of the blocks."""

    double: bool = True


def quantize_linear(weight: torch.Tensor, quantization: Quantization) -> nn.Module:
    """Build a bitsandbytes NF4 layer without a bias that holds ``weight`` ``[out, in]`` and computes in its dtype."""
    bnb = import_bitsandbytes()
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=quantization.double,
            quant_type="nf4",
        )
    packed, state = quantize_nf4(weight, double=quantization.double)
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        compress_statistics=quantization.double,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    # On CPUs with AVX512-BF16, bitsandbytes would repack the weights in place at the first inference call, for a
    # kernel that rounds to bfloat16 and requires sizes divisible by 32. Training could not continue after that.
    layer.support_avx512bf16_for_cpu = False
    return layer


def quantize_nf4(weight: torch.Tensor, *, double: bool) -> tuple[torch.Tensor, Any]:
    """Quantize ``weight`` to NF4. The result is bit-equal to that of ``bitsandbytes.functional.quantize_4bit``.

    bitsandbytes' own CPU code takes 18 s for one layer of a 7B model on two cores, mostly in ``torch.bucketize``. This
    does the same arithmetic in cache-sized chunks on several threads; see ``_quantize_blocks``.

    Returns:
        The packed weight ``[out * in / 2, 1]`` uint8 and bitsandbytes' ``QuantState``.
    """
    functional = import_bitsandbytes().functional
    blocks = _quantize_blocks(weight) if weight.device.type == "cpu" and weight.numel() % BLOCK_SIZE == 0 else None
    if blocks is None:
        return functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=double, quant_type="nf4")
    packed, scales = blocks
    state: dict[str, Any] = {"absmax": scales}
    if double:
        offset = scales.mean()
        quantized, scale_state = functional.quantize_blockwise(scales - offset, blocksize=256)
        state = {"absmax": quantized, "offset": offset, "state2": scale_state}
    code = functional.get_4bit_type("nf4", device=weight.device)
    return packed, functional.QuantState(
        **state, shape=weight.shape, dtype=weight.dtype, blocksize=BLOCK_SIZE, code=code, quant_type="nf4"
    )


def _quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes and scales of all blocks, computed with NumPy, which releases the GIL and starts no OpenMP threads.

    A value's code is the number of midpoints between neighboring NF4 levels that lie below it. Fifteen vectorized
    comparisons count them several times faster than a binary search per value.

    Returns:
        Packed codes ``[N / 2, 1]`` uint8 and scales ``[N / 64]`` float32. None if a weight is not finite; the caller
        leaves such weights to bitsandbytes.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    flat = weight.detach().contiguous().view(-1)
    # NumPy has no bfloat16. Its bits are the upper half of a float32's.
    values = flat.view(torch.int16).numpy().view(np.uint16) if weight.dtype == torch.bfloat16 else flat.numpy()
    levels = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    midpoints = ((levels[:-1] + levels[1:]) / 2).numpy()
    packed = torch.empty(len(flat) // 2, 1, dtype=torch.uint8)
    scales = torch.empty(len(flat) // BLOCK_SIZE)
    packed_array, scales_array = packed.numpy()[:, 0], scales.numpy()

    def quantize_chunk(start: int) -> None:
        chunk = values[start : start + _CHUNK]
        end = start + len(chunk)
        floats = (chunk.astype(np.uint32) << 16).view(np.float32) if chunk.dtype == np.uint16 else chunk.copy()
        blocks = floats.reshape(-1, BLOCK_SIZE)  # [blocks, 64]
        scale = scales_array[start // BLOCK_SIZE : end // BLOCK_SIZE]
        np.abs(blocks).max(axis=1, out=scale)
        with np.errstate(invalid="ignore"):  # not finite: discarded below
            blocks *= (np.float32(1) / np.maximum(scale, np.float32(1e-38)))[:, None]
        codes = np.zeros(len(floats), np.uint8)
        above = np.empty(len(floats), bool)
        for midpoint in midpoints:
            np.greater(floats, midpoint, out=above)
            codes += above.view(np.uint8)
        np.left_shift(codes[::2], 4, out=packed_array[start // 2 : end // 2])
        packed_array[start // 2 : end // 2] |= codes[1::2]

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as threads:
        list(threads.map(quantize_chunk, range(0, len(flat), _CHUNK)))
    return (packed, scales) if bool(np.isfinite(scales_array).all()) else None


def import_bitsandbytes() -> Any:
    """Import bitsandbytes.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "model.quantization=nf4 and train.optimizer=paged_adamw_8bit need bitsandbytes; "
            "install it with `pip install 'babydoctor[train]'`"
        ) from error
    return bitsandbytes


def is_4bit(layer: nn.Module) -> bool:
    """True if a linear layer's weight is in 4 bits."""
    return getattr(layer.weight, "quant_state", None) is not None


def block_scales(layer: nn.Module) -> torch.Tensor:
    """The scales of a 4-bit layer's blocks ``[out * in / 64]`` in float32, in the order of its weights."""
    weight: Any = layer.weight
    state = weight.quant_state
    if not state.nested:
        return state.absmax
    return import_bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The float weight ``[out, in]`` of a plain or 4-bit linear layer."""
    weight: Any = layer.weight
    if not is_4bit(layer):
        return weight.data
    return import_bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
