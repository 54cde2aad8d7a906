"""Which elementwise operations a model trains with: ``train.fuse``."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)

FUSE_FROM_HIDDEN_SIZE = 256
"""Hidden size below which ``auto`` compiles nothing: a tiny model trains in minutes."""


def select_ops(fuse: bool | Literal["auto"], device: torch.device, hidden_size: int) -> ElementwiseOps:
    """The operations that ``train.fuse`` asks for: Liger's kernels on CUDA, compiled ones on the CPU, or plain PyTorch.

    Raises:
        UserError: ``train.fuse: true`` where there are no kernels.
    """
    if fuse == "auto":
        fuse = hidden_size >= FUSE_FROM_HIDDEN_SIZE
        is_asked = False
    else:
        is_asked = fuse
    if not fuse:
        return PLAIN_OPS
    try:
        if device.type == "cuda":
            from babydoctor.model.packed.liger_ops import LigerOps

            return LigerOps()
        return ElementwiseOps(compiled=True)
    except (ImportError, RuntimeError) as error:
        fix = "run pip install liger-kernel" if device.type == "cuda" else "install a C++ compiler (g++)"
        if is_asked:
            raise UserError(f"train.fuse=true: {error}; {fix}, or set train.fuse=auto") from error
        logger.warning("%s; training steps take a tenth to a fifth longer than they could: %s", error, fix)
        return PLAIN_OPS
