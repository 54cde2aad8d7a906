"""Resuming: the loss of every later step is bit-equal to an uninterrupted run's."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.training import STAGES, build_settings, losses, start_training, unfinish, wait_until

from babydoctor.config import build_config, dump_config
from babydoctor.schema import UserError
from babydoctor.train.loop import train


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_settings: dict[str, Any], tmp_path: Path, stage: str) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
def test_a_run_resumes_after_kill_9(tiny_settings: dict[str, Any], tmp_path: Path, fuse: bool) -> None:
    """Includes kernels that each process compiles itself."""
    results = []
    for name in ("whole", "killed"):
        settings = build_settings(tiny_settings, tmp_path / name, "instruct")
        settings["train"] = settings["train"] | {"max_steps": 60, "save_every": 1, "fuse": fuse}
        results.append(build_config(settings))
    whole, killed = results
    train(whole)
    file = tmp_path / "killed.yaml"
    file.write_text(dump_config(killed))
    run = Path(killed.output_dir)
    process = start_training(file)
    wait_until((run / "checkpoints" / "step-3").exists, process)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors[-2000:]
    assert not (run / "manifest.json").exists()
    train(killed, resume=True)
    assert losses(run) == losses(Path(whole.output_dir))


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
