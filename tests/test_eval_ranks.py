"""``accelerate launch -m babydoctor eval``: two ranks share the questions and give what one process gives."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.eval_rows import write_rows
from helpers.launch import ENVIRONMENT, ROOT, kill_rank, launch
from helpers.serving import build_tiny_run
from helpers.training import DEADLINE_S, wait_until

from babydoctor.config import TaskConfig
from babydoctor.eval.ask import GenerationConfig
from babydoctor.eval.run import EvalConfig, evaluate
from babydoctor.ranks import join_ranks
from babydoctor.schema import UserError

CONDITIONS = ("right", "shuffled")
OPTIONS = ("--max-new-tokens=60", "--batch-size=2", "--resamples=100", "--images-as=right,shuffled")


@dataclass(frozen=True)
class Evaluation:
    """A run and questions, and what one process gives."""

    run: Path
    task: TaskConfig
    config: EvalConfig
    out: Path
    result: dict[str, Any]

    def command(self, out: Path) -> list[str]:
        program = ["babydoctor", "eval", str(self.run), "--task=rows", f"--data={self.task.data}", f"--out={out}"]
        return launch("multi_gpu", *program, *OPTIONS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    folder = tmp_path_factory.mktemp("alone")
    run = build_tiny_run(folder / "run")
    task = TaskConfig(task="rows", data=str(write_rows(folder, [*("yes", "no") * 3, "left lung"])))
    generation = GenerationConfig(max_new_tokens=60, batch_size=2)
    config = EvalConfig(images_as=CONDITIONS, generation=generation, num_resamples=100)
    return Evaluation(run, task, config, folder / "out", evaluate(folder / "out", task, config, run=run))


def test_two_ranks_give_the_answers_of_one_process(alone: Evaluation, tmp_path: Path) -> None:
    """Two ranks continue an evaluation after one answer each was written."""
    out = tmp_path / "out"
    shutil.copytree(alone.out, out)
    for name in ("metrics.json", "report.html", "predictions-shuffled.jsonl"):
        (out / name).unlink()
    lines = (out / "predictions-right.jsonl").read_text().splitlines(keepends=True)
    (out / "predictions-right.jsonl").unlink()
    (out / "predictions-right.rank-0.jsonl").write_text(lines[0])
    (out / "predictions-right.rank-1.jsonl").write_text(lines[3] + lines[1][:9])

    done = subprocess.run(
        alone.command(out), env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S * 2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1  # rank 0 alone
    assert_as_alone(out, json.loads((out / "metrics.json").read_text()), alone)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_one_process_continues(alone: Evaluation, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        alone.command(out), env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    part = out / "predictions-right.rank-1.jsonl"
    wait_until(lambda: part.exists() and part.stat().st_size > 0, process)
    kill_rank(process, 1)
    assert part.exists() and not (out / "metrics.json").exists()
    written = [line for line in part.read_text().splitlines(keepends=True) if line.endswith("\n")]

    assert_as_alone(out, evaluate(out, alone.task, alone.config, run=alone.run), alone)
    assert {line.strip() for line in written} <= set((out / "predictions-right.jsonl").read_text().splitlines())


def assert_as_alone(out: Path, result: dict[str, Any], alone: Evaluation) -> None:
    assert not list(out.glob("*.rank-*"))
    for condition in CONDITIONS:
        ours, theirs = predictions(out, condition), predictions(alone.out, condition)
        assert sorted(ours, key=lambda p: p["id"]) == sorted(theirs, key=lambda p: p["id"])
        assert figures(result["conditions"][condition]) == figures(alone.result["conditions"][condition])


def predictions(folder: Path, condition: str) -> list[dict[str, Any]]:
    """Predictions in file order, with confidences to six digits, because batches differ."""
    found = map(json.loads, (folder / f"predictions-{condition}.jsonl").read_text().splitlines())
    return [p | {"confidence": None if p["confidence"] is None else round(p["confidence"], 6)} for p in found]


def figures(condition: dict[str, Any]) -> dict[str, Any]:
    """The figures without undefined ones, which are NaN in memory and null in the file."""
    values = {name: entry["value"] for name, entry in condition["figures"].items()}
    return {name: value for name, value in values.items() if value is not None and value == value}


def test_sharded_weights_are_refused() -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "1", "ACCELERATE_USE_FSDP": "true"}
    with pytest.raises(UserError, match=r"asks for FSDP.*multi_gpu\.yaml"), join_ranks(environment):
        pass
