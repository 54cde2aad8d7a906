"""Whether the elementwise chains of a training step run as compiled kernels, see ``model/elementwise.py``."""

from __future__ import annotations

import logging

from babydoctor.config import TrainConfig
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.packed.fused_ops import fuse
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)

FUSE_FROM_WIDTH = 256
"""Text width below which ``auto`` does not compile: a tiny model trains in minutes."""


def set_fusing(config: TrainConfig, model: BabyDoctor) -> None:
    """Switch the kernels on or off for this process, as ``train.fuse`` says.

    Raises:
        UserError: ``train.fuse: true`` where torch.compile does not work.
    """
    wanted = config.fuse
    if wanted == "auto":
        is_wide = model.language_model.config.hidden_size >= FUSE_FROM_WIDTH
        wanted = model.device.type == "cpu" and is_wide and not config.compile
    try:
        fuse(wanted)
    except RuntimeError as error:
        if config.fuse != "auto":
            raise UserError(f"train.fuse=true: {error}; install a C++ compiler (g++) or set train.fuse=auto") from error
        logger.warning("%s; steps take a tenth to a fifth longer. With a C++ compiler (g++) they would not", error)
