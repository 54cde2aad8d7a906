"""BabyDoctor: a CLIP tower, a projector and a LLaMA, put together by composition.

Shapes: ``B`` rows, ``T`` token positions, ``N`` images, ``P`` patches an image, ``D`` text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel, LlamaForCausalLM

from babydoctor.model.packed.attention import DENSE_ATTENTION_NAME, register_attention
from babydoctor.model.packed.decoder_layer import decoder_layer, tail_index
from babydoctor.model.packed.fused_ops import rms_norm
from babydoctor.model.packed.loss import summed_cross_entropy
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
        compiled: whether ``compile_layers`` was called.
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
        register_attention()
        vision.config._attn_implementation = DENSE_ATTENTION_NAME
        self.vision = vision
        self.projector = projector
        self.language_model = language_model
        self.vision_layer = vision_layer
        self.recompute_every = 0
        self.compiled = False

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
        prefix_length: int = 0,
    ) -> torch.Tensor:
        """Summed negative log-likelihood (float32 scalar) of one packed micro-batch; see ``schema.Batch``.

        All arrays are ``[T]``, documents end to end; ``targets`` are already shifted and ``IGNORE_INDEX`` where
        nothing is supervised. ``pixel_values`` is ``[N, 3, S, S]``. Logits are computed at targets only.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        embeds = self.embed(input_ids[None], image_mask[None], features)
        # What comes before a document's first target only matters as keys and values in the last layer.
        tails = supervised_tails(targets[prefix_length:], document_lengths)
        hidden = self.decode(embeds, position_ids[None], document_lengths, tails, prefix_length)[0]
        targets = targets[tail_index(document_lengths, tails, targets.device, prefix_length)]
        supervised = (targets != IGNORE_INDEX).nonzero()[:, 0]
        return summed_cross_entropy(hidden[supervised], self.language_model.lm_head.weight, targets[supervised])

    def decode(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        document_lengths: Sequence[int],
        tail_lengths: Sequence[int] | None = None,
        prefix_length: int = 0,
    ) -> torch.Tensor:
        """Run LLaMA's layers over packed documents, the final norm included.

        Args:
            embeds: ``[1, T, D]``.
            position_ids: ``[1, T]``.
            tail_lengths: how many of each document's last positions are wanted, ``Q`` together. None: all.
            prefix_length: first positions, which every document sees.

        Returns:
            ``[1, Q, D]``.
        """
        if self.compiled:
            assert not prefix_length, "transformers' layers share no prefix between documents"
            return self._decode_compiled(embeds, position_ids, document_lengths, tail_lengths)
        body: Any = self.language_model.model
        hidden = embeds[0].to(self.language_model.dtype)
        # The precision of each operation is said in the operation; autocast would only look for casts to do.
        with torch.autocast(embeds.device.type, enabled=False):
            cos, sin = (x[0] for x in body.rotary_emb(hidden[None], position_ids))
            for index, layer in enumerate(body.layers):
                tails = tail_lengths if index == len(body.layers) - 1 else None
                call = (
                    partial(checkpoint, decoder_layer, use_reentrant=False)
                    if self._recomputes(index)
                    else decoder_layer
                )
                hidden = call(layer, hidden, cos, sin, document_lengths, tails, prefix_length)
            return rms_norm(hidden, body.norm)[None]

    def _decode_compiled(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        document_lengths: Sequence[int],
        tail_lengths: Sequence[int] | None,
    ) -> torch.Tensor:
        """``decode`` through transformers' own layers, which torch.compile fuses better than ours."""
        body: Any = self.language_model.model
        rotary = body.rotary_emb(embeds, position_ids)
        hidden = embeds
        for index, layer in enumerate(body.layers):
            call = partial(checkpoint, layer.__call__, use_reentrant=False) if self._recomputes(index) else layer
            hidden = call(
                hidden, attention_mask=None, position_embeddings=rotary, document_lengths=tuple(document_lengths)
            )
        if tail_lengths is not None:
            hidden = hidden[:, tail_index(document_lengths, tail_lengths, hidden.device)]
        return body.norm(hidden)

    def _recomputes(self, index: int) -> bool:
        return bool(self.recompute_every) and index % self.recompute_every == 0 and torch.is_grad_enabled()

    def compile_layers(self) -> None:
        """Compile each decoder layer with torch.compile at its first use."""
        self.compiled = True
        layers: Any = self.language_model.model.layers
        for layer in layers:
            layer.compile()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def supervised_tails(targets: torch.Tensor, document_lengths: Sequence[int]) -> tuple[int, ...]:
    """How many positions each document has from its first supervised one on; at least 1.

    Args:
        targets: ``[T]``, ``IGNORE_INDEX`` where not supervised.
    """
    tails = []
    for document in (targets.cpu() != IGNORE_INDEX).split(tuple(document_lengths)):
        tails.append(len(document) - int(document.int().argmax()) if document.any() else 1)
    return tuple(tails)
