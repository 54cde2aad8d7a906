"""Start ranks with ``accelerate launch``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


def launch(config: str, *program: str, num_processes: int = 2) -> list[str]:
    """The command of ``accelerate launch`` with one of the shipped configurations, on CPU ranks."""
    options = ["--config_file", f"configs/accelerate/{config}.yaml", f"--num_processes={num_processes}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port=0"]
    return [*command, "-m", *program]
