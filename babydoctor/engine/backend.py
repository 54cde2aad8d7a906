"""Choose the code that computes a step: PyTorch's operations, or Triton kernels and CUDA graphs on a GPU."""

from __future__ import annotations

import logging

import torch
from transformers import LlamaForCausalLM

from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import FeatureCache, KVCache
from babydoctor.engine.prompt import PromptEmbedder, VisionLanguageModel
from babydoctor.engine.settings import EngineSettings
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)


def build_decoder(model: LlamaForCausalLM, kv_cache: KVCache, settings: EngineSettings) -> Decoder:
    """Build the fastest decoder for the KV cache's device.

    Raises:
        UserError: ``engine.cuda_graphs=true``, and CUDA graphs are not possible here.
    """
    asked = settings.cuda_graphs is True
    if kv_cache.device.type != "cuda":
        if asked:
            raise UserError("engine.cuda_graphs=true needs a model on a CUDA device; remove it")
        return Decoder(model, kv_cache, pack=settings.pack_weights, own=settings.own_weights)
    try:
        from babydoctor.engine.gpu.decoder import GpuDecoder, kernels_fit
    except ImportError as error:
        if asked:
            raise UserError("engine.cuda_graphs=true needs Triton; run pip install triton, or remove it") from error
        logger.warning("Triton is not installed, so answers take several times as long; run pip install triton")
        return Decoder(model, kv_cache, pack=False, own=settings.own_weights)
    try:
        if not kernels_fit(kv_cache):
            raise RuntimeError(f"there are no kernels for heads of size {kv_cache.head_dim}")
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
