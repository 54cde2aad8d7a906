"""The projector from vision width to text width: a linear layer, or LLaVA-1.5's two-layer MLP."""

from __future__ import annotations

from torch import nn

PROJECTOR_KINDS = ("linear", "mlp2x_gelu")


def build_projector(kind: str, vision_width: int, text_width: int) -> nn.Linear | nn.Sequential:
    """Build an untrained projector ``[.., vision_width] -> [.., text_width]``."""
    if kind == "linear":
        return nn.Linear(vision_width, text_width)
    assert kind == "mlp2x_gelu", kind
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))
