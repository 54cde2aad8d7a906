"""Compare the compiled operator with PyTorch's operations on a tiny model before it serves a real one."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from babydoctor.config import LoraConfig
from babydoctor.engine.cpu.decoder import CpuDecoder
from babydoctor.engine.cpu.library import load_operator
from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import KVCache
from babydoctor.engine.layout import Chunk, DecodeRows
from babydoctor.model.families import LanguageModel
from babydoctor.model.lora import add_lora
from babydoctor.model.nf4 import Quantization, quantize_linear

logger = logging.getLogger(__name__)

Weights = Literal["bfloat16", "int8", "nf4"]
"""``nf4`` with LoRAs, as a stage leaves it."""

LARGEST_DIFFERENCE: dict[Weights, float] = {"bfloat16": 0.03, "int8": 0.15, "nf4": 0.05}
"""Relative difference of logits. Measured: 0.011 in bfloat16, 0.046 in int8 and 0.019 in NF4.

From float32, the operator is as far as PyTorch: 0.010 in bfloat16 and 0.013 in NF4.
"""


@functools.cache
def operator_works(*, with_nf4: bool = False) -> bool:
    """True if the operator can be built here and computes a step like PyTorch. If not, the reason is logged.

    Args:
        with_nf4: check 4-bit weights as well, which needs bitsandbytes.
    """
    if load_operator() is None:
        return False
    differences = {kind: difference_from_pytorch(kind) for kind in LARGEST_DIFFERENCE if with_nf4 or kind != "nf4"}
    wrong = [f"{value:.1%} ({kind})" for kind, value in differences.items() if not value < LARGEST_DIFFERENCE[kind]]
    if wrong:
        logger.warning("the engine's CPU operator is not used: its logits differ by %s here", " and ".join(wrong))
    return not wrong


@torch.inference_mode()
def difference_from_pytorch(kind: Weights) -> float:
    """Relative difference of the logits of decoding steps after prompts of different lengths, for 1 and for 7 rows."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = _build_model(with_nf4=kind == "nf4")
        tokens = torch.randint(200, (7, 40))

    def logits(decoder_kind: type[Decoder], dtype: torch.dtype, **options: bool) -> torch.Tensor:
        cache = KVCache(2, 2, 16, 64, 8, 7, dtype, torch.device("cpu"))
        decoder = decoder_kind(model, cache, **options)
        for slot, row in enumerate(tokens):
            embeds = decoder.embed_tokens(row[: 5 + 5 * slot])
            decoder.forward(DecodeRows([], [], []), [Chunk(slot, 0, embeds, True)])
        many = decoder.forward(DecodeRows([7] * 7, list(range(7)), [5 + 5 * slot for slot in range(7)]), [])
        return torch.cat([many, decoder.forward(DecodeRows([9], [6], [36]), [])]).float()

    expected = logits(Decoder, torch.float32, pack=False)
    actual = logits(CpuDecoder, torch.bfloat16, is_int8=kind == "int8")
    return float((actual - expected).norm() / expected.norm())


def _build_model(*, with_nf4: bool) -> LanguageModel:
    """A bfloat16 LLaMA with random weights, in NF4 and with LoRAs if asked for."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 200}
    config: LlamaConfig = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64)  # type: ignore[arg-type]
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model = model.to(torch.bfloat16)
    if with_nf4:
        linears = {name: part for name, part in model.model.named_modules() if isinstance(part, nn.Linear)}
        for name, linear in linears.items():
            model.model.set_submodule(name, quantize_linear(linear.weight.detach(), Quantization()))
        add_lora(model, LoraConfig(r=4, alpha=8))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.detach().normal_(0.0, 0.1)
    return model
