"""The CPU cores that this process may use."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Number of cores that this process may use.

    ``taskset``, containers and Slurm may allow fewer than ``os.cpu_count()`` counts.
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
