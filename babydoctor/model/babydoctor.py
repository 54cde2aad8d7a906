"""BabyDoctor: a CLIP tower, a projector and a LLaMA, put together by composition.

Shapes: ``B`` rows, ``T`` token positions, ``N`` images, ``P`` patches an image, ``D`` text width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel, LlamaForCausalLM

from babydoctor.model.loss import summed_cross_entropy
from babydoctor.model.vision import num_patches, patch_features
from babydoctor.schema import IGNORE_INDEX


class BabyDoctor(nn.Module):
    """The composition. 4-bit and LoRA live inside ``language_model`` and reach nothing else.

    Attributes:
        vision: frozen CLIP tower.
        projector: vision width -> text width.
        language_model: LLaMA; its linear layers may be bitsandbytes 4-bit and may carry peft LoRA layers,
            injected in place (the class stays ``LlamaForCausalLM``).
        vision_layer: the tower's hidden layer that is projected (-2 in LLaVA).
        recompute_every: 0 keeps all activations; ``k`` recomputes one decoder layer in ``k`` in the backward
            pass (1: all of them).
    """

    def __init__(
        self,
        vision: CLIPVisionModel,
        projector: nn.Module,
        language_model: LlamaForCausalLM,
        *,
        vision_layer: int = -2,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.projector = projector
        self.language_model = language_model
        self.vision_layer = vision_layer
        self.recompute_every = 0

    @property
    def num_patches(self) -> int:
        """Positions that one image takes."""
        return num_patches(self.vision.config)

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[N, 3, S, S]`` normalised pixels -> ``[N, P, D]`` in the language model's width."""
        features = patch_features(self.vision, pixel_values, self.vision_layer)
        weight = next(self.projector.parameters())
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return self.projector(features)

    def embed(
        self, input_ids: torch.Tensor, image_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings with the image features put into their slots.

        Args:
            input_ids: ``[B, T]``; image slots hold any valid id.
            image_mask: ``[B, T]`` bool, true in ``N * P`` places.
            image_features: ``[N, P, D]`` in the order of the slots, or None without images.
        """
        embeds = self.language_model.model.embed_tokens(input_ids)
        if image_features is None:
            assert not image_mask.any(), "image slots without image features"
            return embeds
        flat = image_features.flatten(0, 1).to(embeds.dtype)
        assert len(flat) == int(image_mask.sum()), (flat.shape, int(image_mask.sum()))
        return embeds.masked_scatter(image_mask[..., None], flat)

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor,
        image_mask: torch.Tensor,
        document_lengths: tuple[int, ...],
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed negative log-likelihood (float32 scalar) of one packed micro-batch.

        All arrays are ``[T]``, documents end to end; ``targets`` are already shifted and ``IGNORE_INDEX`` where
        nothing is supervised. ``pixel_values`` is ``[N, 3, S, S]``. Logits are computed at targets only.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        embeds = self.embed(input_ids[None], image_mask[None], features)
        hidden = self.decode(embeds, position_ids[None], document_lengths)[0]
        supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
        return summed_cross_entropy(hidden[supervised], self.language_model.lm_head.weight, targets[supervised])

    def decode(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, document_lengths: tuple[int, ...]
    ) -> torch.Tensor:
        """Run LLaMA's layers over packed documents: ``[1, T, D] -> [1, T, D]``, after the final norm."""
        body: Any = self.language_model.model
        rotary = body.rotary_emb(embeds, position_ids)
        hidden = embeds
        for index, layer in enumerate(body.layers):
            recompute = self.recompute_every and index % self.recompute_every == 0 and torch.is_grad_enabled()
            call = partial(checkpoint, layer.__call__, use_reentrant=False) if recompute else layer
            hidden = call(hidden, attention_mask=None, position_embeddings=rotary, document_lengths=document_lengths)
        return body.norm(hidden)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
