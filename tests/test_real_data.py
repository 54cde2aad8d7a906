"""The same program on real radiology data: sets made, checked, trained on, and a real DICOM file answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from babydoctor.cli import build_app

CONFIG = """
name: real
output_dir: {out}/run
model:
  language_model: {golden}/base
  vision_tower: {golden}/clip
  dtype: float32
trainable: [projector]
lora: {{r: 8, alpha: 16, dropout: 0.0}}
data:
  rows: [{out}/vqa-rad/train.json, {out}/roco/validation.json]
  images: {out}/all
  template: llava_llama_2
  image_mode: pad
  max_length: 320
  num_workers: 0
train:
  batch_size: 16
  micro_batch_tokens: 2048
  max_steps: 24
  learning_rate: 1.0e-2
  seed: 0
tracking: {{tensorboard: false}}
"""


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_real_radiology_data_from_files_to_an_answer(shared_dir: Path, golden: Path, tmp_path: Path) -> None:
    examples = pytest.importorskip("pydicom.examples")
    data = shared_dir / "data"
    run("data", "vqa-rad", "--source", data / "vqa-rad", "--out", tmp_path / "vqa-rad", "--copy")
    run("data", "roco", "--source", data / "roco", "--split", "validation", "--out", tmp_path / "roco", "--copy")
    both = tmp_path / "all"  # two sets, one image folder
    (tmp_path / "vqa-rad" / "images").rename(both)
    for image in (tmp_path / "roco" / "images").iterdir():
        image.rename(both / image.name)
    rows = (tmp_path / "vqa-rad" / "train.json", tmp_path / "roco" / "validation.json")
    limits = ("--tokenizer", golden / "base", "--num-patches", "16", "--max-length", "320")
    told = run("data", "check", *rows, "--images", both, "--bad", tmp_path / "bad.jsonl", *limits)
    assert "1,799 of 1,799 rows are good; 315 images were decoded" in told

    config = tmp_path / "real.yaml"
    config.write_text(CONFIG.format(out=tmp_path, golden=golden))
    run("train", config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [step["loss"] for line in lines if "loss" in (step := json.loads(line))]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.8 * sum(losses[:6]), losses

    scan = examples.get_path("ct")
    assert run("chat", tmp_path / "run", "--image", scan, "--max-new-tokens", "8", "What is seen here?").strip()
