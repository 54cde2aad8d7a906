"""Progress lines in a log file: the time left, and the figures of training."""

from __future__ import annotations

import pytest

from babydoctor import progress
from babydoctor.train.report import StepProgress


def test_the_time_left_is_estimated_without_what_came_before_the_first_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.named_progress() as update:
        now += 300  # loading
        for done in (1, 2):  # a batch
            update("answers", done, 10)
        now += 40
        update("answers", 3, 10)
        now += 40
        update("answers", 5, 10)
        now += 20
        update("maps", 4, 6)  # three were done before
    assert capsys.readouterr().err.splitlines() == [
        "answers: 1 of 10",
        "answers: 3 of 10, about 140 s left",
        "answers: 5 of 10, about 100 s left",
        "maps: 4 of 6",
    ]


def test_steps_before_the_first_loss_show_none(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress("align", 0, 2) as steps:
        steps.update(1, loss=None, tokens_per_s=3.0, samples_per_s=0.0123)
        steps.update(2, loss=0.5, tokens_per_s=2000.0, samples_per_s=12.34)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("align: step 1/2  0.012 samples/s  3 tokens/s")
    assert lines[-1].startswith("align: step 2/2  loss 0.500  12.3 samples/s  2,000 tokens/s")
