"""Helpers for tests of training: settings of small stages, training processes, interrupted runs, small disks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from babydoctor.train.tracking import read_metrics

DEADLINE_S = 180.0
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
STAGES: dict[str, dict[str, Any]] = {
    "align": {"data": {"template": "plain"}},
    "instruct": {"lora": LORA},
    "radiology": {"lora": LORA, "model": {"quantization": "nf4"}, "train": {"optimizer": "paged_adamw_8bit"}},
}


def build_settings(tiny_settings: dict[str, Any], run: Path, stage: str) -> dict[str, Any]:
    """The settings of a tiny stage that writes to ``run``."""
    settings = tiny_settings | {"output_dir": str(run)}
    for key, value in STAGES[stage].items():
        settings[key] = settings.get(key, {}) | value
    return settings


def accelerator_on(device: str) -> Accelerator:
    """A single process on ``device``; accelerate would keep the device of an earlier one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", device_placement=False)


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of each record."""
    return [(record["step"], record["loss"]) for record in read_metrics(run)]


def unfinish(run: Path, last_step: int) -> None:
    """Put a run into the state after a kill at ``last_step``: without newer checkpoints and results."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > last_step:
            shutil.rmtree(path)
    for name in ("manifest.json", "projector.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "adapter", ignore_errors=True)


def start_training(config: Path, *arguments: str, threads: int = 1, **environment: str) -> subprocess.Popen[str]:
    """``python -m babydoctor.train`` in its own process group, as a terminal or Slurm starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "babydoctor.train", str(config), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> None:
    """Wait for a condition while ``process`` runs. If it does not become true, the process and its group are killed."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            raise AssertionError(f"not true in {deadline_s} s, exit status {process.returncode}:\n{out}\n{err}")
        time.sleep(0.002)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` at ``folder``. Skips the test if this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
