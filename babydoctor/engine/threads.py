"""OpenMP teams: only one thread of the process may keep helpers while the engine computes.

Every thread that once ran a parallel operator of torch keeps a team of helpers. As soon as all teams together are
more threads than there are cores, GNU's OpenMP no longer waits actively between two operators but sleeps and is
woken, some hundred times a decoding step. Measured on two cores after the model was loaded on another thread: 8.7 ms
a step instead of 5.9.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_PAUSE_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0: settings stay, threads go."""


def release_team() -> bool:
    """End the calling thread's OpenMP helpers; its next parallel operator starts new ones.

    Returns:
        Whether that was done: not where torch uses another OpenMP than GNU's, which has no such limit.
    """
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        pause = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if pause is not None:
            return bool(pause(_PAUSE_SOFT) == 0)
    return False
