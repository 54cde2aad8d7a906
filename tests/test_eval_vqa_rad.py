"""The real VQA-RAD rows, a tenth held out by image: constant answers and traps, by exact and published metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from babydoctor.config import TaskConfig
from babydoctor.data.sets.vqa_rad import prepare_vqa_rad
from babydoctor.eval.load import load_task
from babydoctor.eval.run import EvalConfig, evaluate
from babydoctor.eval.score import CONSTANT_ANSWERS, PUBLISHED_SOURCES, score_baselines
from babydoctor.eval.tasks import Task


@pytest.fixture(scope="module")
def prepared(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vqa-rad")
    prepare_vqa_rad(shared_dir / "data" / "vqa-rad", out, hold_out_images=0.1)
    return out


@pytest.fixture(scope="module")
def task(prepared: Path) -> Task:
    return load_task(TaskConfig(task="vqa-rad", data=str(prepared / "held_out.json")))


def test_the_official_file_is_read_completely(shared_dir: Path) -> None:
    whole = load_task(TaskConfig(task="vqa-rad", data=str(shared_dir / "data" / "vqa-rad"), split="train"))
    assert len(whole.questions) == 1797
    assert sum(question.kind == "closed" for question in whole.questions) == 1027


def test_no_image_is_in_both_splits(prepared: Path, task: Task) -> None:
    train = {row["image"] for row in json.loads((prepared / "train.json").read_text())}
    held_out = {question.image_key for question in task.questions}
    assert len(held_out) == 31
    assert not train & held_out


@pytest.mark.parametrize("trap", ["yes no", "appears normal"])
def test_traps_score_high_under_the_published_name_only(task: Task, trap: str) -> None:
    assert trap in CONSTANT_ANSWERS
    scored = score_baselines(task)
    assert scored[trap]["llava_med_closed_accuracy"] >= scored["always no"]["llava_med_closed_accuracy"] > 0.5
    ours = {name: value for name, value in scored[trap].items() if name not in PUBLISHED_SOURCES}
    assert ours.pop("unparseable_rate") == 1.0
    assert all(value < 0.05 for value in ours.values()), ours


def test_yes_no_scores_over_90_percent_by_the_published_rule(task: Task) -> None:
    assert score_baselines(task)["yes no"]["llava_med_closed_accuracy"] > 0.9


def test_constant_answers_are_at_chance_and_in_the_report(prepared: Path, task: Task, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": q.id, "answer": q.references[0]}) + "\n" for q in task.questions))
    config = TaskConfig(task="vqa-rad", data=str(prepared / "held_out.json"), train=(str(prepared / "train.json"),))
    result = evaluate(tmp_path / "out", config, EvalConfig(num_resamples=200), predictions=answers)
    figures = result["conditions"]["right"]["figures"]
    assert figures["closed_accuracy"]["value"] == figures["open_token_f1"]["value"] == 1.0
    assert result["baselines"]["always yes"]["yes_no_balanced_accuracy"] == 0.5
    assert result["baselines"]["always no"]["yes_no_balanced_accuracy"] == 0.5
    assert result["leakage"]["num_seen"] == 0
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert b"always yes" in page
    assert len(page) < 10_000_000
