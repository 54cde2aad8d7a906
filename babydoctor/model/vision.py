"""The CLIP vision tower (pixels -> patch features, frozen in every stage) and the projector to text width.

Shapes: ``N`` images, ``P`` patches (256 for CLIP-L/14 at 224 px), ``D`` vision width (1024 there).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from babydoctor.model.weights import WeightReader, local_directory, read_model_config
from babydoctor.schema import UserError

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")

_TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""The weights of a whole CLIP, such as openai/clip-vit-large-patch14, that its vision tower does not have."""


def load_vision_tower(path: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> CLIPVisionModel:
    """Load a CLIP tower from a directory or the hub: the tower alone, or the vision half of a whole CLIP.

    Raises:
        UserError: it is not there, not a CLIP, or weights are missing, unknown or of the wrong shape.
    """
    directory = local_directory(path)
    with torch.device("meta"):
        tower = CLIPVisionModel._from_config(load_vision_config(directory), dtype=dtype)
    missing = {_plain_name(name): name for name, _ in tower.named_parameters()}
    reader = WeightReader(directory)
    for stored in reader.files:
        plain = _plain_name(stored)
        if stored.startswith(_TEXT_HALF) or plain.endswith("position_ids"):
            continue
        name = missing.pop(plain, None)
        if name is None:
            raise UserError(f"{directory} holds an unknown weight {stored!r}; is it a plain CLIP?")
        weight = reader.read(stored)
        expected = tower.get_parameter(name).shape
        if weight.shape != expected:
            raise UserError(
                f"{directory}: weight {stored!r} has the shape {tuple(weight.shape)}, config.json asks for "
                f"{tuple(expected)}"
            )
        module, _, parameter = name.rpartition(".")
        setattr(tower.get_submodule(module), parameter, nn.Parameter(weight.to(device, dtype)))
    if missing:
        raise UserError(
            f"{directory} lacks {len(missing)} weights of a CLIP vision tower, the first is {min(missing)!r}"
        )
    for name, buffer in list(tower.named_buffers()):
        assert name.endswith("position_ids"), name
        embeddings = tower.get_submodule(name.rpartition(".")[0])
        embeddings.register_buffer("position_ids", torch.arange(buffer.shape[1], device=device)[None], persistent=False)
    return tower.eval().requires_grad_(False)


def _plain_name(name: str) -> str:
    """A tower's weight below ``vision_model.``, a level that some releases of transformers have and others do not."""
    return name.removeprefix("vision_model.")


def load_vision_config(path: str | Path) -> CLIPVisionConfig:
    """Read the configuration of a CLIP tower.

    Raises:
        UserError: it is not there or not a CLIP.
    """
    config = read_model_config(path, "vision tower")
    if config.model_type not in ("clip", "clip_vision_model"):
        raise UserError(
            f"the vision tower {str(path)!r} is a {config.model_type!r}; BabyDoctor takes CLIP towers, "
            "for example openai/clip-vit-large-patch14"
        )
    return getattr(config, "vision_config", config)


def num_patches(config: object) -> int:
    """Tokens that one image takes in the text, from the tower's configuration."""
    return (config.image_size // config.patch_size) ** 2  # type: ignore[attr-defined]


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, pixel_values: torch.Tensor, layer: int = -2) -> torch.Tensor:
    """Features of hidden layer ``layer`` (negative, counted from the end) without the class token.

    The layers above it are not computed. Equals ``hidden_states[layer][:, 1:]`` of the whole tower.

    Args:
        pixel_values: ``[N, 3, S, S]``, normalised.

    Returns:
        ``[N, P, D]`` in the tower's dtype.
    """
    body = getattr(tower, "vision_model", tower)  # older transformers 5 releases nest the model once more
    hidden = body.pre_layrnorm(body.embeddings(pixel_values.to(tower.dtype)))
    blocks = body.encoder.layers
    for block in blocks[: len(blocks) + 1 + layer]:
        output = block(hidden, attention_mask=None)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden[:, 1:]


def build_projector(kind: str, vision_width: int, text_width: int) -> nn.Linear | nn.Sequential:
    """Build an untrained projector ``[.., vision_width] -> [.., text_width]``: linear, or LLaVA-1.5's two-layer MLP."""
    if kind == "linear":
        return nn.Linear(vision_width, text_width)
    assert kind == "mlp2x_gelu", kind
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))
