"""Two processes train as one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.training import DEADLINE_S, wait_until

from babydoctor.config import build_config, dump_config
from babydoctor.train.checkpoint import list_checkpoints
from babydoctor.train.loop import train
from babydoctor.train.tracking import read_metrics

LONG = {"max_steps": 100_000, "save_every": 0}
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"),
    *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", "babydoctor.train"),
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def test_two_gloo_ranks_have_the_losses_of_one(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_settings | {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    alone = build_config(settings | {"output_dir": str(tmp_path / "alone")})
    train(alone)
    together = build_config(settings | {"output_dir": str(tmp_path / "together")})
    file = tmp_path / "together.yaml"
    file.write_text(dump_config(together))
    result = subprocess.run([*LAUNCH, str(file)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [[r["loss"] for r in read_metrics(Path(c.output_dir))] for c in (alone, together)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_stop_after_the_same_step_and_resume(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = build_config(tiny_settings | {"output_dir": str(run), "train": tiny_settings["train"] | LONG})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config))
    for arguments in ([], ["--resume"]):
        before = len(read_metrics(run))
        process = subprocess.Popen(
            [*LAUNCH, str(file), *arguments],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda before=before: len(read_metrics(run)) > before, process)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode != 0
        step = read_metrics(run)[-1]["step"]
        # The launcher signals one rank after the other; the second may get its signal when it has already stopped.
        assert f"stopped by SIGTERM after step {step} of 100000; a checkpoint is saved" in err, err[-3000:]
        assert list_checkpoints(run)[-1].name == f"step-{step}"
        assert ("resumed after step" in out) == bool(arguments)
