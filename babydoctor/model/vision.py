"""The CLIP vision tower (pixels -> patch features, frozen in every stage) and the projector to text width.

Shapes: ``N`` images, ``P`` patches (256 for CLIP-L/14 at 224 px), ``D`` vision width (1024 there).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from babydoctor.schema import UserError

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")


def load_vision_tower(path: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> CLIPVisionModel:
    """Load a CLIP tower (alone, or the vision half of a whole CLIP) from a directory or the hub.

    Raises:
        UserError: it is not there or not a CLIP.
    """
    load_vision_config(path)
    try:
        with _no_progress_bar():  # it is there in no time
            tower = CLIPVisionModel.from_pretrained(str(path), dtype=dtype)
    except OSError as error:
        raise UserError(f"no vision tower could be loaded from {str(path)!r}: {error}") from error
    tower.to(torch.device(device))  # type: ignore[arg-type]
    return tower.eval().requires_grad_(False)


def load_vision_config(path: str | Path) -> CLIPVisionConfig:
    """The configuration of a CLIP tower.

    Raises:
        UserError: it is not there or not a CLIP.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"no vision tower could be read from {str(path)!r}: {error}") from error
    if config.model_type not in ("clip", "clip_vision_model"):
        raise UserError(
            f"the vision tower {str(path)!r} is a {config.model_type!r}; BabyDoctor takes CLIP towers, "
            "for example openai/clip-vit-large-patch14"
        )
    return getattr(config, "vision_config", config)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def num_patches(config: object) -> int:
    """How many positions one image takes in the text, from the tower's configuration."""
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
