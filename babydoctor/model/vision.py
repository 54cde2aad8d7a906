"""The CLIP or SigLIP vision tower (pixels -> patch features, frozen in every stage) and the projector.

Shapes: ``N`` images, ``P`` patches (256 for CLIP-L/14 at 224 px), ``D`` hidden size of the tower (1024 for CLIP-L).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from babydoctor.model.families import TOWERS, VisionTower, build_tower, has_class_token, load_vision_config
from babydoctor.model.weights import WeightReader, local_directory
from babydoctor.schema import UserError

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")

_UNUSED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "vision_model.head.")
"""Weights of a complete CLIP or SigLIP that the tower does not have, and SigLIP's pooling head, which nothing reads."""


def load_vision_tower(path: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> VisionTower:
    """Load a vision tower from a directory or the hub. The checkpoint may also be a complete CLIP or SigLIP.

    Raises:
        UserError: it does not exist, is of another family, or has missing, unknown or wrongly shaped weights.
    """
    directory = local_directory(path)
    config = load_vision_config(directory)
    family = TOWERS[config.model_type]
    with torch.device("meta"):
        tower = build_tower(config, dtype)
    missing = {_plain_name(name): name for name, _ in tower.named_parameters()}
    reader = WeightReader(directory)
    for stored in reader.files:
        plain = _plain_name(stored)
        if stored.startswith(_UNUSED) or plain.startswith("head.") or plain.endswith("position_ids"):
            continue
        name = missing.pop(plain, None)
        if name is None:
            raise UserError(f"{directory} holds an unknown weight {stored!r}; is it a plain {family}?")
        weight = reader.read(stored)
        expected = tower.get_parameter(name).shape
        if weight.shape != expected:
            raise UserError(
                f"{directory}: weight {stored!r} has the shape {tuple(weight.shape)}, but config.json requires "
                f"{tuple(expected)}"
            )
        module, _, parameter = name.rpartition(".")
        setattr(tower.get_submodule(module), parameter, nn.Parameter(weight.to(device, dtype)))
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} weights of a {family} vision tower, the first is {min(missing)!r}"
        )
    for name, buffer in list(tower.named_buffers()):
        assert name.endswith("position_ids"), name
        embeddings = tower.get_submodule(name.rpartition(".")[0])
        embeddings.register_buffer("position_ids", torch.arange(buffer.shape[1], device=device)[None], persistent=False)
    return tower.eval().requires_grad_(False)


def _plain_name(name: str) -> str:
    """The name of a weight without ``vision_model.``, which depends on the release of transformers."""
    return name.removeprefix("vision_model.")


def num_patches(config: object) -> int:
    """Tokens that one image takes, from the configuration of the tower."""
    return (config.image_size // config.patch_size) ** 2  # type: ignore[attr-defined]


@torch.no_grad()
def patch_features(tower: VisionTower, pixel_values: torch.Tensor, layer: int = -2) -> torch.Tensor:
    """Features of hidden layer ``layer`` (negative, counted from the end) without CLIP's class token.

    Later layers are not computed. Equal to ``hidden_states[layer]`` of the complete tower, of CLIP ``[:, 1:]``.

    Args:
        pixel_values: ``[N, 3, S, S]``, normalized.

    Returns:
        ``[N, P, D]`` in the tower's dtype.
    """
    body: Any = getattr(tower, "vision_model", tower)  # older releases of transformers 5 nest the model
    hidden = body.embeddings(pixel_values.to(tower.dtype))
    is_clip = has_class_token(tower.config)
    if is_clip:
        hidden = body.pre_layrnorm(hidden)
    blocks = body.encoder.layers
    for block in blocks[: len(blocks) + 1 + layer]:
        output = block(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden[:, 1:] if is_clip else hidden


def build_projector(kind: str, vision_size: int, text_size: int) -> nn.Linear | nn.Sequential:
    """Build an untrained projector ``[.., vision_size] -> [.., text_size]``: linear, or LLaVA-1.5's two-layer MLP."""
    if kind == "linear":
        return nn.Linear(vision_size, text_size)
    assert kind == "mlp2x_gelu", kind
    return nn.Sequential(nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size))
