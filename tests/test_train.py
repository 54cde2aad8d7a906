"""The training program: what it writes, what it changes and what it does not change."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from babydoctor.config import build_config
from babydoctor.model.run_dir import read_manifest
from babydoctor.schema import UserError
from babydoctor.train.loop import train
from babydoctor.train.optimizer import learning_rate_factor
from babydoctor.train.tracking import read_metrics


def digest(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_run_directory_is_complete(tiny_run: Path) -> None:
    names = {path.name for path in tiny_run.iterdir()}
    assert {"manifest.json", "config.yaml", "projector.safetensors", "adapter", "metrics.jsonl", "loss.png"} <= names
    assert [path.name for path in sorted((tiny_run / "checkpoints").iterdir())] == ["step-4", "step-6"]
    manifest = read_manifest(tiny_run)
    assert (manifest.lineage[0].steps, manifest.lineage[0].samples) == (6, 24)
    assert [record["step"] for record in read_metrics(tiny_run)] == [1, 2, 3, 4, 5, 6]


def test_the_loss_falls_and_the_base_is_unchanged(
    tiny_settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    before = digest(tiny_base)
    more = {"max_steps": 20, "learning_rate": 1e-2, "save_every": 0}
    settings = tiny_settings | {"output_dir": str(tmp_path / "run"), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
    train(build_config(settings | {"train": settings["train"] | more}))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), losses
    assert digest(tiny_base) == before


@pytest.mark.parametrize("tokens", [256, 4096])
def test_micro_batches_do_not_change_the_losses(
    tiny_settings: dict[str, Any], tiny_run: Path, tmp_path: Path, tokens: int
) -> None:
    """Without dropout, whose random numbers depend on a token's position in its micro-batch."""
    losses = []
    for size in (512, tokens):
        run = tmp_path / str(size)
        settings = tiny_settings | {"output_dir": str(run), "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
        train(build_config(settings | {"train": settings["train"] | {"micro_batch_tokens": size}}))
        losses.append([record["loss"] for record in read_metrics(run)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_bad_image_stops_training_or_is_listed_and_counted(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(tiny_rows / "images", images)
    (images / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    data = tiny_settings["data"] | {"images": str(images)}
    steps = tiny_settings["train"] | {"max_steps": 3}  # one epoch
    settings = tiny_settings | {"data": data, "train": steps, "output_dir": str(tmp_path / "refused")}
    with pytest.raises(UserError, match=r"3\.png"):
        train(build_config(settings))
    settings |= {"data": data | {"on_bad": "quarantine"}, "output_dir": str(tmp_path / "run")}
    train(build_config(settings))
    listed = [json.loads(line) for line in (tmp_path / "run" / "cut_and_left_out.jsonl").read_text().splitlines()]

    assert any(line["id"] == "3" for line in listed)
    assert read_manifest(tmp_path / "run").lineage[0].samples == 11, "no other row replaces the bad row"
    assert "1 left out" in capfd.readouterr().out


@pytest.mark.parametrize("model", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_a_task_at_intervals_is_reported_and_changes_nothing(
    tiny_settings: dict[str, Any], tiny_rows: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    settings = tiny_settings | {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
    settings["model"] = settings["model"] | model
    task = {"task": "rows", "data": str(tiny_rows / "rows.json"), "every_steps": 4, "images_as": ["right", "shuffled"]}
    train(build_config(settings | {"output_dir": str(tmp_path / "without")}))
    train(build_config(settings | {"output_dir": str(tmp_path / "with"), "eval": task}))
    records = read_metrics(tmp_path / "with")
    asked = [record for record in records if record["kind"].startswith("task/")]
    recorded = [(record["step"], record["kind"]) for record in asked]
    assert recorded == [(step, f"task/{condition}") for step in (4, 6) for condition in ("right", "shuffled")]
    for record in asked:
        low, high = record["intervals"]["open_token_f1"]
        assert 0 <= low <= record["open_token_f1"] <= high <= 1
        assert record["num_failed"] == 0
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / run) if record["kind"] == "train"]
        for run in ("without", "with")
    ]
    assert losses[0] == losses[1]


def test_an_invalid_task_stops_the_run_before_the_first_step(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    task = {"task": "vqa-rad", "data": str(tmp_path / "missing.json")}
    settings = tiny_settings | {"output_dir": str(tmp_path / "run"), "eval": task}
    with pytest.raises(UserError, match=r"missing\.json"):
        train(build_config(settings))
    assert read_metrics(tmp_path / "run") == []


def test_the_schedule_equals_transformers() -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, 3, 100)
    for step in range(100):
        assert learning_rate_factor(step, 100, 0.03, "cosine") == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
