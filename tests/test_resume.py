"""Resuming: the loss at every later step equals an uninterrupted run's to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from babydoctor.config import build_config, dump_config
from babydoctor.schema import UserError
from babydoctor.train.loop import train
from babydoctor.train.report import read_metrics

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
STAGES: dict[str, dict[str, Any]] = {
    "align": {"data": {"template": "plain"}},
    "instruct": {"lora": LORA},
    "radiology": {"lora": LORA, "model": {"quantization": "nf4"}, "train": {"optimizer": "paged_adamw_8bit"}},
}


def build_settings(tiny_settings: dict[str, Any], run: Path, stage: str) -> dict[str, Any]:
    settings = tiny_settings | {"output_dir": str(run)}
    for key, value in STAGES[stage].items():
        settings[key] = settings.get(key, {}) | value
    return settings


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run)]


def unfinish(run: Path, last_step: int) -> None:
    """Leave a run as a kill after ``last_step`` would: newer checkpoints and the results are not there."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > last_step:
            shutil.rmtree(path)
    for path in ("manifest.json", "projector.safetensors"):
        (run / path).unlink()
    shutil.rmtree(run / "adapter", ignore_errors=True)


@pytest.mark.parametrize("stage", STAGES)
def test_the_rest_equals_an_uninterrupted_run(tiny_settings: dict[str, Any], tmp_path: Path, stage: str) -> None:
    if stage == "radiology":
        pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    config = build_config(build_settings(tiny_settings, run, stage))
    train(config)
    whole, projector = losses(run), (run / "projector.safetensors").read_bytes()
    unfinish(run, last_step=4)
    half_written = run / "checkpoints" / ".step-5.tmp-1"
    half_written.mkdir()
    (half_written / "state.json").write_text('{"step": 5')
    train(config, resume=True)
    assert losses(run) == whole
    assert (run / "projector.safetensors").read_bytes() == projector


@pytest.mark.parametrize("fuse", [False, True])
def test_kill_9_in_the_middle(tiny_settings: dict[str, Any], tmp_path: Path, fuse: bool) -> None:
    """Also with kernels that each process compiles for itself."""
    results = []
    for name in ("whole", "killed"):
        settings = build_settings(tiny_settings, tmp_path / name, "instruct")
        settings["train"] = settings["train"] | {"max_steps": 60, "save_every": 1, "fuse": fuse}
        results.append(build_config(settings))
    whole, killed = results
    train(whole)
    file = tmp_path / "killed.yaml"
    file.write_text(dump_config(killed))
    process = subprocess.Popen(
        [sys.executable, "-m", "babydoctor.train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    run = Path(killed.output_dir)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-3").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told.decode()[-2000:]
    assert not (run / "manifest.json").exists()
    train(killed, resume=True)
    assert losses(run) == losses(Path(whole.output_dir))


def test_a_changed_configuration_is_named(tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path) -> None:
    settings = build_settings(tiny_settings, tmp_path / "run", "align")
    train(build_config(settings))
    unfinish(tmp_path / "run", last_step=4)
    changed = settings | {"train": settings["train"] | {"learning_rate": 0.5}}
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        train(build_config(changed), resume=True)
    with pytest.raises(UserError, match="--resume"):
        train(build_config(settings))


def test_changed_rows_are_refused(tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    shutil.copy(tiny_rows / "rows.json", rows)
    settings = build_settings(tiny_settings, tmp_path / "run", "align")
    settings["data"] = settings["data"] | {"rows": [str(rows)]}
    train(build_config(settings))
    unfinish(tmp_path / "run", last_step=4)
    values = json.loads(rows.read_text())
    values[0]["conversations"][1]["value"] = "Another answer"
    rows.write_text(json.dumps(values))
    with pytest.raises(UserError, match="other rows"):
        train(build_config(settings), resume=True)
