"""Select the elementwise operations for training (``train.fuse``)."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from babydoctor.model.packed.fused_ops import PLAIN_OPS, ElementwiseOps
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)

FUSE_FROM_HIDDEN_SIZE = 256
"""``auto`` compiles nothing below this hidden size, because a tiny model trains within minutes."""


def select_ops(fuse: bool | Literal["auto"], device: torch.device, hidden_size: int) -> ElementwiseOps:
    """Return the operations for ``train.fuse``: Liger's kernels on CUDA, compiled ones on the CPU, or plain PyTorch.

    Raises:
        UserError: ``fuse`` is True and there are no kernels for this device.
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
        logger.warning("%s; training steps take 10 to 20%% longer without fused kernels; to get them: %s", error, fix)
        return PLAIN_OPS
