"""Start ranks with ``accelerate launch``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from helpers.training import DEADLINE_S

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


def kill_rank(launcher: subprocess.Popen[str], rank: int) -> None:
    """Kill one rank with SIGKILL, and check that the launcher fails and that all ranks end."""
    ranks = {
        child.environ()["RANK"]: child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    ranks[str(rank)].kill()
    _, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode != 0, errors[-2000:]
    psutil.wait_procs(ranks.values(), timeout=DEADLINE_S)
    assert not any(child.is_running() for child in ranks.values())
