"""Choose the code that computes a step: PyTorch's operations, one compiled operator on a CPU, or Triton kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from babydoctor.engine.cpu.check import operator_works
from babydoctor.engine.cpu.decoder import CpuDecoder, fits
from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import FeatureCache, KVCache
from babydoctor.engine.linear import has_room_for_copy
from babydoctor.engine.prompt import PromptEmbedder, VisionLanguageModel
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.families import LanguageModel
from babydoctor.model.nf4 import is_4bit
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)


def uses_cpu_operator(model: LanguageModel, settings: EngineSettings) -> bool:
    """True if the compiled operator computes the steps of a model. It keeps keys and values in bfloat16.

    Raises:
        UserError: ``engine.weights=int8`` is set, and the operator cannot run.
    """
    is_asked = settings.weights == "int8"
    reason = _why_no_operator(model, settings)
    if is_asked and reason:
        raise UserError(f"engine.weights=int8 is not possible: {reason}. Change that, or remove engine.weights")
    return not reason


def _why_no_operator(model: LanguageModel, settings: EngineSettings) -> str:
    """The reason not to use the operator for a model; empty if it can be used."""
    if settings.pack_weights is False and settings.weights is None:
        return "engine.pack_weights=false"
    if settings.kv_dtype not in (None, "bfloat16"):
        return f"engine.kv_dtype={settings.kv_dtype}, and it needs bfloat16"
    if not fits(model):
        return (
            "it takes a LLaMA on a CPU in bfloat16 or 4 bits (`babydoctor merge RUN --out DIR --dtype bfloat16` "
            "writes one)"
        )
    if not settings.own_weights and not has_room_for_copy(model.parameters()):
        return "a second copy of the weights takes too much of this machine's memory"
    if not operator_works(with_nf4=any(is_4bit(part) for part in model.modules() if isinstance(part, nn.Linear))):
        return "the operator could not be built or gives wrong numbers here, see the log; is g++ installed?"
    return ""


def build_decoder(
    model: LanguageModel, allocate: Callable[[], KVCache], settings: EngineSettings, *, on_cpu_operator: bool = False
) -> Decoder:
    """Build the fastest decoder for the model's device.

    Args:
        allocate: allocates the KV cache. On a CPU it is called once weights are copied and freed, when the memory left
            is known, or at once if the settings name the cache's size.
        on_cpu_operator: the result of ``uses_cpu_operator``.

    Raises:
        UserError: ``engine.cuda_graphs=true``, and CUDA graphs are not possible here.
    """
    asked = settings.cuda_graphs is True
    if model.model.norm.weight.device.type != "cuda":
        if asked:
            raise UserError("engine.cuda_graphs=true needs a model on a CUDA device; remove it")
        kv_cache = allocate if settings.kv_budget_bytes is None else allocate()
        if on_cpu_operator:
            return CpuDecoder(model, kv_cache, is_int8=settings.weights == "int8", own=settings.own_weights)
        return Decoder(model, kv_cache, pack=settings.pack_weights, own=settings.own_weights)
    kv_cache = allocate()
    try:
        from babydoctor.engine.gpu.decoder import GpuDecoder, check_kernels
    except ImportError as error:
        if asked:
            raise UserError("engine.cuda_graphs=true needs Triton; run pip install triton, or remove it") from error
        logger.warning("Triton is not installed, so answers take several times as long; run pip install triton")
        return Decoder(model, kv_cache, pack=False, own=settings.own_weights)
    try:
        check_kernels(model, kv_cache)
        decoder = GpuDecoder(model, kv_cache, own=settings.own_weights)
        if settings.cuda_graphs is not False:
            decoder.capture_graphs()
        decoder.check()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's compiler and CUDA raise many kinds
        if asked:
            raise UserError(f"engine.cuda_graphs=true is not possible on this GPU: {error}; remove it") from error
        logger.warning("the engine's GPU kernels are not used, so answers take several times as long: %s", error)
        return Decoder(model, kv_cache, pack=False, own=settings.own_weights)
    return decoder


def build_embedder(model: VisionLanguageModel, decoder: Decoder, cache: FeatureCache) -> PromptEmbedder:
    """Build the prompt embedder. It encodes images with a CUDA graph if the decoder uses CUDA graphs."""
    encode_images = None
    if decoder.has_graphs:
        from babydoctor.engine.gpu.images import GraphedEncoder

        encode_images = GraphedEncoder(model.encode_images)
    return PromptEmbedder(model, decoder.embed_tokens, cache, encode_images)
