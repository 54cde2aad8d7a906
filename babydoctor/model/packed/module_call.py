"""Runs a function of a module's weights as the module's own forward pass, so that the module's hooks run around it.

Training computes with the weights of transformers' modules in its own order and never calls the modules themselves.
FSDP2 and ZeRO-3 shard weights and gather them in the hooks of a module's call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def call_module(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``function(x)``, with the hooks of ``module(x)`` before and after it, if the module has any."""
    if not has_hooks(module):
        return function(x)
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        return module(x)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def has_hooks(module: nn.Module) -> bool:
    """True if something runs before or after the module's forward pass."""
    return bool(module._forward_pre_hooks or module._forward_hooks)
