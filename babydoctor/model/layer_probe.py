"""Run a fixed prompt through a language model layer by layer, to compare models that do not fit into memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

from babydoctor.model.families import LanguageConfig
from babydoctor.model.language_model import build_language_model
from babydoctor.model.lora import LoraUpdate

NUM_TOKENS = 48


def group_by_layer(names: Iterable[str]) -> list[list[str]]:
    """Group weights in the order in which the model uses them: embeddings, each decoder layer, final norm and head."""
    groups: dict[int, list[str]] = {}
    for name in names:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        place = int(layer[1]) if layer else -1 if name == "model.embed_tokens.weight" else 10**9
        groups.setdefault(place, []).append(name)
    return [groups[place] for place in sorted(groups)]


class LayerProbe:
    """The state of a pseudo-random prompt between two layers, in float32.

    Attributes:
        hidden: ``[1, T, D]`` after the last decoder layer so far; None before the embeddings.
        logits: ``[T, V]``; None until the end.
    """

    def __init__(self, config: LanguageConfig, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        generator = torch.Generator().manual_seed(0)
        self._input_ids = torch.randint(config.vocab_size, (1, NUM_TOKENS), generator=generator).to(self.device)
        one_layer: Any = copy.deepcopy(config)
        one_layer.num_hidden_layers = 1
        if hasattr(one_layer, "layer_types"):
            one_layer.layer_types = one_layer.layer_types[:1]
        body: Any = build_language_model(one_layer, torch.float32).eval().model
        # Without a mask transformers attends to all earlier tokens, even if the model has a sliding window.
        self._layer = body.layers[0]
        rotary = type(body.rotary_emb)(one_layer).to(self.device)
        self._positions = rotary(torch.zeros(1, device=self.device), torch.arange(NUM_TOKENS, device=self.device)[None])
        self._eps = config.rms_norm_eps

    @torch.no_grad()
    def advance(self, weights: Mapping[str, torch.Tensor], update: LoraUpdate | None = None) -> None:
        """Run one group of ``group_by_layer``.

        Args:
            weights: the weights of the group by name. With tied embeddings the last group also needs
                ``lm_head.weight``.
            update: a LoRA that is applied without merging it into the weights.
        """
        if "model.embed_tokens.weight" in weights:
            self.hidden = weights["model.embed_tokens.weight"][self._input_ids].float()
            return
        assert self.hidden is not None, "the embeddings come first"
        if "lm_head.weight" in weights:
            norm = weights["model.norm.weight"].float()
            self.logits = rms_norm(self.hidden, norm.shape, norm, self._eps)[0] @ weights["lm_head.weight"].float().T
            return
        prefix = re.match(r"model\.layers\.\d+\.", next(iter(weights)))
        assert prefix is not None, list(weights)
        parameters = {name.removeprefix(prefix[0]): weight.float() for name, weight in weights.items()}
        hooks = []
        for name, module in self._layer.named_modules():
            factors = update.factors(prefix[0] + name, self.device) if update else None
            if factors is not None:
                hooks.append(module.register_forward_hook(partial(_add_lora, factors=factors)))
        output = functional_call(self._layer, parameters, self.hidden, {"position_embeddings": self._positions})
        self.hidden = output[0] if isinstance(output, tuple) else output
        for hook in hooks:
            hook.remove()


def _add_lora(
    module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, *, factors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    low, high = factors  # [r, in], [out, r]
    return output + args[0] @ low.T @ high.T
