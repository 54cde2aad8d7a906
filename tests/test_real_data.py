"""The program on real radiology data: prepare sets, check them, train, and answer about a real DICOM file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.conversation import get_template, render
from babydoctor.data.loader import StepSampler
from babydoctor.data.packing import common_prefix, pack
from babydoctor.data.rows import parse_row
from babydoctor.data.sets.roco import build_row, read_captions
from babydoctor.data.tokens import encode, load_tokenizer

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
def test_real_radiology_data_from_files_to_answers(shared_dir: Path, golden: Path, tmp_path: Path) -> None:
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
    output = run("data", "check", *rows, "--images", both, "--bad", tmp_path / "bad.jsonl", *limits)
    assert "1,799 of 1,799 rows are good; 315 images were decoded" in output

    config = tmp_path / "real.yaml"
    config.write_text(CONFIG.format(out=tmp_path, golden=golden))
    run("train", config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [step["loss"] for line in lines if "loss" in (step := json.loads(line))]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.8 * sum(losses[:6]), losses

    scan = examples.get_path("ct")
    assert run("chat", tmp_path / "run", "--image", scan, "--max-new-tokens", "8", "What is seen here?").strip()


def roco_rows(data: Path) -> list[dict[str, Any]]:
    captions = data / "roco" / "validation" / "radiology" / "captions.txt"
    return [build_row(digits, caption) for digits, caption in read_captions(captions)][:1280]


def multi_turn_rows(data: Path) -> list[dict[str, Any]]:
    """VQA-RAD's questions about an image as one conversation."""
    by_image: dict[str, list[dict[str, str]]] = {}
    for item in json.loads((data / "vqa-rad" / "VQA_RAD_train.json").read_text()):
        turns = by_image.setdefault(item["image_name"], [])
        turns.append({"from": "human", "value": ("" if turns else "<image>\n") + item["question"]})
        turns.append({"from": "gpt", "value": str(item["answer"])})
    return [{"id": name, "image": name, "conversations": turns} for name, turns in by_image.items()]


@pytest.mark.parametrize(("rows", "padded"), [(roco_rows, 0.745), (multi_turn_rows, 0.707)])
def test_micro_batches_contain_no_padding(
    shared_dir: Path, golden: Path, rows: Callable[[Path], list[dict[str, Any]]], padded: float
) -> None:
    """Real captions and conversations with 256 slots per image, in steps of 128 samples."""
    tokenizer, template = load_tokenizer(golden / "base"), get_template("llava_llama_2")
    examples = []
    for row in rows(shared_dir / "data"):
        sample = parse_row(row, "test")
        segments = render(sample.turns, template)
        examples.append(encode(segments, tokenizer, 256, max_length=1024, id=sample.id, images=(sample.image or "",)))
    sampler = StepSampler(len(examples), 128, 0)
    used, in_padded = [], []
    for step in range(sampler.steps_per_epoch):
        chosen = [examples[index] for index in sampler.samples_of_step(step)]
        batches = pack(chosen, 4096)
        prefix = common_prefix(chosen)
        needed = sum(len(example) - prefix for example in chosen) + prefix * len(batches)
        used.append(needed / sum(len(batch) for batch in batches))
        in_padded.append(sum(map(len, chosen)) / (len(chosen) * max(map(len, chosen))))
        assert prefix == 70 and max(map(len, batches)) <= 4096
        # As few as the limit allows, or one more.
        assert len(batches) <= -(-(needed - prefix * len(batches)) // (4096 - prefix)) + 1
    assert min(used) >= 0.97
    assert sum(in_padded) / len(in_padded) == pytest.approx(padded, abs=0.03)
