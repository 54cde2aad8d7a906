"""wandb: a missing package is reported before anything is loaded, files are in the run, and a resume keeps the id."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.training import build_settings, unfinish

from babydoctor.config import TrackingConfig, build_config
from babydoctor.schema import UserError
from babydoctor.train.loop import train
from babydoctor.train.tracking import check_tracking


def hide_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make a package look as if it were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find_spec(wanted)
    )


def test_a_missing_wandb_is_reported_before_anything_is_loaded(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_package(monkeypatch, "wandb")
    settings = build_settings(tiny_settings, tmp_path / "run", "align")
    settings |= {"tracking": {"tensorboard": False, "wandb_project": "lungs"}}
    settings["data"] = settings["data"] | {"rows": [str(tmp_path / "missing.json")]}  # would be the next error
    with pytest.raises(UserError, match=r"tracking\.wandb_project=lungs .*pip install 'babydoctor\[wandb\]'.*=null"):
        train(build_config(settings))
    assert not (tmp_path / "run").exists()


def test_a_missing_tensorboard_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracking(TrackingConfig(tensorboard=False))
    hide_package(monkeypatch, "tensorboard")
    with pytest.raises(
        UserError, match=r"tracking\.tensorboard=True .*babydoctor\[train\].*tracking\.tensorboard=false"
    ):
        check_tracking(TrackingConfig(tensorboard=True))


def test_wandb_files_are_in_the_run_and_a_resume_keeps_the_id(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (pip install 'babydoctor[wandb]')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    settings = build_settings(tiny_settings, run, "align")
    config = build_config(settings | {"tracking": {"tensorboard": False, "wandb_project": "lungs"}})
    train(config)
    id = json.loads((run / "wandb.json").read_text())["id"]
    unfinish(run, last_step=4)
    train(config, resume=True)
    assert json.loads((run / "wandb.json").read_text())["id"] == id
    offline = sorted((run / "wandb").glob("offline-run-*"))
    assert offline and all(path.name.endswith(f"-{id}") for path in offline)
    assert all((path / f"run-{id}.wandb").stat().st_size > 0 for path in offline)
    assert not (tmp_path / "wandb").exists()
