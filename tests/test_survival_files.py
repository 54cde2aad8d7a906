"""Evaluation files with unusual line breaks, and rows whose images are outside the image folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from babydoctor.config import TaskConfig
from babydoctor.eval.ask import read_predictions
from babydoctor.eval.load import load_task
from babydoctor.files import split_lines
from babydoctor.schema import UserError

ODD = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg"


def test_only_a_newline_ends_a_line() -> None:
    assert (
        split_lines(f"{ODD}\r\nx\n\ny") == [ODD, "x", "", "y"] and split_lines("") == [] and split_lines("x\n") == ["x"]
    )


def test_predictions_survive_unicode_line_breaks(tmp_path: Path) -> None:
    """Before: the file that the evaluation had written itself was "not valid JSON"."""
    file = tmp_path / "predictions.jsonl"
    file.write_text(
        "".join(json.dumps({"id": n, "answer": ODD}, ensure_ascii=False) + "\n" for n in range(3)), encoding="utf-8"
    )
    assert [prediction.answer for prediction in read_predictions(file)] == [ODD] * 3


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", "..\\secret.png"])
def test_a_row_of_an_evaluation_cannot_leave_the_image_folder(tmp_path: Path, name: str) -> None:
    """Before: the file was read, wherever it was, and shown to the model."""
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": "1", "image": name, "conversations": turns}]))
    with pytest.raises(UserError, match="leaves the image folder"):
        load_task(TaskConfig(task="rows", data=str(rows)))
