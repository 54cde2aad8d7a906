"""``data check`` on several processes: the same report as one process, and the error if a process dies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from babydoctor.data.check import check
from babydoctor.data.check.check import CheckSettings, check_sources
from babydoctor.data.check.workers import CheckTask, WorkerProcesses
from babydoctor.schema import UserError


def row(number: int, image: str, answer: str = "CT.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": image, "conversations": turns}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Thirty rows with ten images, of which one is damaged; bad rows of several kinds in different chunks."""
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"damaged")
    rows: list[Any] = [row(number, f"{number % 10}.png") for number in range(30)]
    rows[11], rows[25] = rows[2], "no row"
    rows[12]["image"], rows[28]["id"] = "gone.png", "0"
    rows[29] = row(29, "9.png", "word " * 300)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_two_processes_give_the_same_report_as_one(rows: Path, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ROWS_PER_TASK", 3)
    monkeypatch.setattr(check, "_IMAGES_PER_TASK", 2)
    settings = CheckSettings(rows.parent / "images", str(golden / "base"), max_length=300, num_patches=16)
    one, two = (check_sources([rows], settings, num_processes=n, keep_samples=True) for n in (1, 2))
    assert two == one
    found = [(problem.source.rpartition("#")[2], problem.reason) for problem in two.problems]
    assert found == [
        *(("11", "duplicate"), ("12", "image_missing"), ("25", "not_a_row"), ("29", "too_long")),
        *(("7", "image_undecodable"), ("17", "image_undecodable"), ("27", "image_undecodable")),
    ]
    assert (two.num_rows, two.num_images, two.num_repeated_ids) == (30, 10, 1)
    assert [sample.image for sample in two.samples_with_image[:2]] == ["0.png", "1.png"]


def test_an_error_in_a_process_reaches_the_user(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ROWS_PER_TASK", 3)
    with pytest.raises(UserError, match="no image folder is given"):
        check_sources([rows], CheckSettings(None), num_processes=2)


def die_at_the_third(lock: object) -> Callable[[list[str], Callable[[int], None]], list[str]]:
    def handle(items: list[str], report: Callable[[int], None]) -> list[str]:
        for index, item in enumerate(items):
            report(index)
            if item == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return items

    return handle


def test_a_process_that_dies_is_an_error_that_names_the_row() -> None:
    with WorkerProcesses(1, die_at_the_third) as workers:
        workers.submit(CheckTask(["good"], ["rows.json#0"]))
        assert workers.wait()[1] == ["good"]
        workers.submit(CheckTask(["good", "good", "die"], ["rows.json#1", "rows.json#2", "rows.json#3"]))
        with pytest.raises(UserError, match=r"rows\.json#3: the process that checked it died \(SIGKILL\)"):
            workers.wait()
