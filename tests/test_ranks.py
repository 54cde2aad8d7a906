"""Two processes train as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from babydoctor.config import build_config, dump_config
from babydoctor.train.loop import train
from babydoctor.train.report import read_metrics


def test_two_gloo_ranks_have_the_losses_of_one(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_settings | {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    alone = build_config(settings | {"output_dir": str(tmp_path / "alone")})
    train(alone)
    together = build_config(settings | {"output_dir": str(tmp_path / "together")})
    file = tmp_path / "together.yaml"
    file.write_text(dump_config(together))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    result = subprocess.run(
        [*command, "-m", "babydoctor.train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [[r["loss"] for r in read_metrics(Path(c.output_dir))] for c in (alone, together)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
