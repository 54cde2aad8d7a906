"""The BabyDoctor model: a vision tower, a projector and a language model of the families in ``families.py``.

Shapes: ``T`` tokens, ``Q`` tokens whose output is needed, ``M`` loss positions, ``N`` images, ``P`` patches per image,
``D`` hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from babydoctor.data.layout import AttentionLayout, PackedBatch, build_attention_layout
from babydoctor.model.families import LanguageModel, VisionTower, sliding_window
from babydoctor.model.packed.decoder_layer import decoder_layer
from babydoctor.model.packed.dense_attention import DENSE_ATTENTION_NAME, register_attention
from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.model.packed.loss import summed_cross_entropy
from babydoctor.model.packed.module_call import call_module, has_hooks
from babydoctor.model.vision import num_patches, patch_features


class BabyDoctor(nn.Module):
    """Vision tower, projector and language model. Only ``language_model`` may hold 4-bit or LoRA layers.

    Attributes:
        vision: frozen CLIP or SigLIP tower.
        projector: hidden size of the tower -> hidden size of the language model.
        language_model: transformers' model. Its linear layers may be bitsandbytes 4-bit layers and may have peft LoRA
            layers injected in place; the class stays.
        vision_layer: the hidden layer of the tower whose features are projected (-2 in LLaVA).
        recompute_every: gradient checkpointing. 0 keeps all activations; ``k`` recomputes every ``k``-th decoder layer
            in the backward pass (1: all layers).
        ops: the elementwise operations used in training.
        window: how many tokens a token attends to, itself included (Mistral); None: all before it.
    """

    def __init__(
        self,
        vision: VisionTower,
        projector: nn.Module,
        language_model: LanguageModel,
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
        self.ops: ElementwiseOps = PLAIN_OPS
        self.window = sliding_window(language_model.config)

    @property
    def num_patches(self) -> int:
        """Tokens that one image takes."""
        return num_patches(self.vision.config)

    @property
    def patch_size(self) -> int:
        """Edge of a patch in pixels."""
        size: Any = self.vision.config.patch_size
        return int(size)

    @property
    def device(self) -> torch.device:
        return self.language_model.device

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[N, 3, S, S]`` normalized pixels -> ``[N, P, D]`` features with the hidden size of the language model."""
        features = patch_features(self.vision, pixel_values, self.vision_layer)
        weight = next(self.projector.parameters())
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(weight.dtype)
        return self.projector(features)

    def embed(
        self, input_ids: torch.Tensor, image_mask: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """Token embeddings, with image features in the image slots.

        This reads the values of the mask and therefore waits for the GPU. Training uses ``embed_packed``, for which the
        loader prepares the slots' indices.

        Args:
            input_ids: ``[B, T]``; image slots hold any valid id.
            image_mask: ``[B, T]`` bool, true at the ``N * P`` image slots.
            image_features: ``[N, P, D]`` in the order of the slots, or None if there are no images.

        Returns:
            ``[B, T, D]``.
        """
        image_index = image_mask.flatten().nonzero()[:, 0]
        return self.embed_packed(input_ids.flatten(), image_index, image_features).unflatten(0, input_ids.shape)

    def embed_packed(
        self, input_ids: torch.Tensor, image_index: torch.Tensor, image_features: torch.Tensor | None
    ) -> torch.Tensor:
        """``embed`` for one row of tokens ``[T]`` whose image slots are at ``image_index``, int64 ``[N * P]``.

        Returns:
            ``[T, D]``.
        """
        embeds = self.language_model.model.embed_tokens(input_ids)
        if image_features is None:
            assert not len(image_index), "image slots without image features"
            return embeds
        flat = image_features.flatten(0, 1).to(embeds.dtype)
        assert len(flat) == len(image_index), (flat.shape, image_index.shape)
        return embeds.index_copy(0, image_index, flat)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Summed negative log-likelihood (float32 scalar) of one packed micro-batch.

        Logits are computed at the loss positions only. The precision is that of the frozen weights.
        """
        dtype = self.language_model.dtype
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            features = self._features(batch.pixel_values)
            embeds = self.embed_packed(batch.input_ids, batch.image_index, features)
            # Of the tokens before a document's first target, only the last layer's keys and values are needed.
            hidden = self.decode(embeds[None], batch.position_ids[None], batch.every, (batch.tail_index, batch.tail))[0]
            hidden = hidden.index_select(0, batch.loss_index)  # [M, D]
            head: Any = self.language_model.lm_head
            return call_module(head, lambda x: summed_cross_entropy(x, head.weight, batch.loss_targets), hidden)

    def _features(self, pixel_values: torch.Tensor | None) -> torch.Tensor | None:
        """``[N, P, D]``, or None without images.

        A trained projector runs on zero images too: every micro-batch then reaches every trained parameter, which
        engines with collectives in the backward pass need.
        """
        if pixel_values is not None:
            return self.encode_images(pixel_values)
        weight = next(self.projector.parameters())
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return None
        if has_hooks(self.vision):  # ZeRO-3: every rank must gather the tower's weights, or the others wait for it
            size: Any = self.vision.config.image_size
            return self.encode_images(torch.zeros((1, 3, size, size), device=weight.device))[:0]
        shape = (0, self.num_patches, self.vision.config.hidden_size)
        return self.projector(torch.zeros(shape, dtype=weight.dtype, device=weight.device))

    def decode(
        self,
        embeds: torch.Tensor,
        position_ids: torch.Tensor,
        layout: AttentionLayout | Sequence[int],
        tail: tuple[torch.Tensor, AttentionLayout] | None = None,
    ) -> torch.Tensor:
        """Run the decoder's layers and the final norm over packed documents.

        Args:
            embeds: ``[1, T, D]``.
            position_ids: ``[1, T]``.
            layout: the attention layout of the documents, or only their lengths.
            tail: int64 ``[Q]``, the tokens whose output is needed, and their attention layout. None: all tokens.

        Returns:
            ``[1, Q, D]``.
        """
        if not isinstance(layout, AttentionLayout):
            layout = build_attention_layout(layout, device=embeds.device)
        body: Any = self.language_model.model
        hidden = embeds[0].to(self.language_model.dtype)
        window = self.window if self.window is not None and self.window < layout.max_keys else None
        # Every operation sets its precision itself, so autocast would only cost time.
        with torch.autocast(embeds.device.type, enabled=False):
            cos, sin = (x[0] for x in body.rotary_emb(hidden[None], position_ids))
            for index, layer in enumerate(body.layers):
                is_last = tail is not None and index == len(body.layers) - 1
                wanted, attention_layout = tail if is_last and tail else (None, layout)
                where = {"cos": cos, "sin": sin, "attention_layout": attention_layout, "tail": wanted, "window": window}
                run: Any = partial(decoder_layer, layer, **where, ops=self.ops)
                if self._recomputes(index):
                    run = partial(checkpoint, run, use_reentrant=False)
                hidden = call_module(layer, run, hidden)
            return call_module(body.norm, lambda x: self.ops.rms_norm(x, body.norm), hidden)[None]

    def _recomputes(self, index: int) -> bool:
        return bool(self.recompute_every) and index % self.recompute_every == 0 and torch.is_grad_enabled()

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
