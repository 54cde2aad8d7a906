"""A switch of the processor that training small models on a CPU needs."""

from __future__ import annotations


def flush_denormals() -> None:
    """Numbers near zero come up while losses are flat, and a CPU computes with them a hundred times slower."""
    import torch

    torch.set_flush_denormal(True)
