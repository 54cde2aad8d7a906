"""The Slurm batch script, with substitutes for Slurm's commands: two ranks requeue on SIGUSR1 and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.serving import free_port
from helpers.training import DEADLINE_S, wait_until

from babydoctor.config import build_config, dump_config
from babydoctor.train.loop import train
from babydoctor.train.tracking import read_metrics

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"

SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
pids=()
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUES"; fi
"""


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.skipif(
    "BABYDOCTOR_SLURM" not in os.environ, reason="two ranks under load take minutes; BABYDOCTOR_SLURM=1 runs it"
)
def test_a_job_that_is_signaled_is_requeued_and_resumes(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / "scripts" / "setup.sh").write_text("")  # the environment of the test is the job's
    shutil.copytree(ROOT / "configs" / "accelerate", checkout / "configs" / "accelerate")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    run, requeues = tmp_path / "run", tmp_path / "requeues"
    train(build_config(tiny_settings | {"output_dir": str(run), "train": tiny_settings["train"] | {"max_steps": 2}}))
    longer = tiny_settings["train"] | {"max_steps": 100_000, "save_every": 0}
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(build_config(tiny_settings | {"output_dir": str(run), "train": longer})))
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "STRATEGY": "fsdp",
        "REQUEUES": str(requeues),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "MASTER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        ["bash", SCRIPT, config],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(read_metrics(run)) > 2, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "babydoctor.train" in child.cmdline() and child.environ().get("RANK"):
            child.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, err[-2000:]
    assert "resumed after step 2" in out
    assert "stopped by SIGUSR1 after step" in err
    assert requeues.read_text() == "requeue 7\n"
    assert json.loads((run / "history.json").read_text())["strategy"] == "fsdp"
