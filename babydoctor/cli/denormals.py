"""The floating-point mode of every command that computes with a model."""

from __future__ import annotations


def flush_denormals() -> None:
    """Treat denormal numbers as zero, in this thread and in threads that it starts later.

    Training produces denormals while losses are flat, and a CPU computes with them a hundred times slower. Results can
    differ in the last bits between the two modes, so all commands that train or evaluate must set it: a stage of
    ``babydoctor demo`` is then bitwise equal to the same stage of ``babydoctor train``.
    """
    import torch

    torch.set_flush_denormal(True)
