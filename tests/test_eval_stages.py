"""The ablation of the stages: what is trained for each variant, and the resulting table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from babydoctor.demo.ablation import (
    TINY_CONFIGS,
    StagesConfig,
    mean_and_range,
    run_stages,
    stage_config,
    to_markdown,
    variants,
    write_picture,
)
from babydoctor.schema import UserError


def test_every_stage_is_left_out_once() -> None:
    assert variants(["align", "instruct", "radiology"]) == {
        "all stages": ("align", "instruct", "radiology"),
        "without align": ("instruct", "radiology"),
        "without instruct": ("align", "radiology"),
        "without radiology": ("align", "instruct"),
    }


def test_the_first_stage_starts_from_the_base_and_later_ones_from_a_run(tmp_path: Path) -> None:
    settings = StagesConfig(
        tmp_path,
        data=tmp_path / "ph",
        base=tmp_path / "base",
        overrides=("train.max_steps=7", "align:train.max_steps=9"),
    )
    path = TINY_CONFIGS / "instruct.yaml"
    first = stage_config(settings, path, "instruct", 1, tmp_path / "run", None)
    assert first.init_from is None
    assert first.model.language_model == str(tmp_path / "base" / "llama")
    assert (first.train.seed, first.train.max_steps) == (43, 7)
    assert first.data.rows == (str(tmp_path / "ph" / "instruct_train.json"),)
    later = stage_config(settings, path, "instruct", 0, tmp_path / "run", tmp_path / "before")
    assert later.init_from == str(tmp_path / "before")


def test_the_error_for_a_missing_base_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo --check"):
        run_stages(StagesConfig(tmp_path / "out", data=tmp_path, base=tmp_path))
    with pytest.raises(UserError, match="LABEL=DIRECTORY"):
        run_stages(StagesConfig(tmp_path / "out", runs=("nowhere",)))


def _row(right: float, shuffled: float) -> dict[str, Any]:
    return {
        "right": {"closed_accuracy": right},
        "shuffled": {"closed_accuracy": shuffled},
        "by_kind": {"side": right},
        "distinct_share": 0.1,
        "num_questions": 10,
    }


def test_the_ablation_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    table = {
        "task": "phantom",
        "num_seeds": 2,
        "num_questions": 10,
        "variants": {"all stages": [_row(0.8, 0.3), _row(0.9, 0.2)], "without align": [_row(0.5, 0.3), _row(0.5, 0.3)]},
        "chance": 0.35,
        "overrides": [],
    }
    text = to_markdown(table)
    assert "| all stages | 85.0% (80.0%–90.0%) | 85.0% (80.0%–90.0%) | 25.0% (20.0%–30.0%) |" in text
    assert "35.0%" in text
    write_picture(tmp_path / "stages.png", table)
    assert (tmp_path / "stages.png").stat().st_size > 5_000
    assert mean_and_range([None]) is None
