"""Input embeddings of prompts: token embeddings with projected image features at the image positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from babydoctor.engine.kv_cache import Content, FeatureCache
from babydoctor.engine.request import ImageInput, InvalidRequestError
from babydoctor.model.families import LanguageModel


class VisionLanguageModel(Protocol):
    """The part of ``BabyDoctor`` that the engine uses."""

    language_model: LanguageModel

    @property
    def num_patches(self) -> int: ...

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor: ...


class PromptEmbedder:
    """Embeds prompts. Caches the features of recent images.

    ``encode_images`` replaces the model's own by a faster function for a single image with the same result.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        embed_tokens: nn.Module,
        cache: FeatureCache,
        encode_images: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self._encode_images = encode_images or model.encode_images
        self._embed_tokens = embed_tokens
        weight = model.language_model.model.norm.weight
        self._device, self._dtype = weight.device, weight.dtype

    def embed(
        self, input_ids: np.ndarray, content: Content, images: Sequence[ImageInput], start: int = 0
    ) -> torch.Tensor:
        """Embeddings ``[T - start, D]`` of the positions from ``start`` on.

        Args:
            input_ids: int ``[T]``.
            content: content of the same positions, which says where each image begins.
            images: aligned with ``content.images``.
            start: first position.

        Raises:
            InvalidRequestError: an image's pixels are not finite.
        """
        ids = torch.from_numpy(input_ids[start:].astype(np.int64)).to(self._device)
        embeds = self._embed_tokens(ids)  # [T - start, D]
        for (first, _), image in zip(content.images, images, strict=True):
            end = first + self.model.num_patches
            if end > start:
                features = self._features(image)
                begin = max(first, start)
                embeds[begin - start : end - start] = features[begin - first :].to(embeds.dtype)
        return embeds

    def _features(self, image: ImageInput) -> torch.Tensor:
        """Projected features ``[P, D]``, from the cache if the image is there."""
        features = self.cache.get(image.key)
        if features is not None:
            return features
        pixels = image.pixels() if callable(image.pixels) else image.pixels
        pixels = np.asarray(pixels, np.float32)  # [3, S, S]
        if not np.isfinite(pixels).all():
            raise InvalidRequestError("an image's pixels are not all finite numbers")
        features = self._encode_images(torch.from_numpy(pixels)[None].to(self._device))[0]
        features = features.to(self._dtype)
        self.cache.put(image.key, features)
        return features
