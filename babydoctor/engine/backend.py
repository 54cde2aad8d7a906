"""Which code computes a step: PyTorch's own operations, or Triton kernels and CUDA graphs on a GPU."""

from __future__ import annotations

import logging

import torch

from babydoctor.engine.decoder import Decoder
from babydoctor.engine.kv_cache import FeatureCache, KVCache
from babydoctor.engine.prompt import PromptEmbedder, VisionLanguageModel
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.families import LanguageModel
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)


def build_decoder(model: LanguageModel, kv_cache: KVCache, settings: EngineSettings) -> Decoder:
    """The fastest decoder for the KV cache's device.

    Raises:
        UserError: ``engine.cuda_graphs=true`` where there can be none.
    """
    asked = settings.cuda_graphs is True
    if kv_cache.device.type != "cuda":
        if asked:
            raise UserError("engine.cuda_graphs=true needs a model on a CUDA device; remove it")
        return Decoder(model, kv_cache, pack=settings.pack_weights, own=settings.own_weights)
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
    """Embeds prompts; encodes images by a CUDA graph where the decoder has graphs too."""
    encode_images = None
    if decoder.has_graphs:
        from babydoctor.engine.gpu.images import GraphedEncoder

        encode_images = GraphedEncoder(model.encode_images)
    return PromptEmbedder(model, decoder.embed_tokens, cache, encode_images)
