"""Progress lines in a log file, with the time left."""

from __future__ import annotations

import pytest

from babydoctor import progress


def test_the_time_left_counts_the_first_item_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.named_progress() as update:
        now += 30
        update("answers", 1, 10)
        now += 30
        update("answers", 2, 10)
        now += 20
        update("maps", 4, 6)  # three were done before
    assert capsys.readouterr().err.splitlines() == [
        "answers: 1 of 10, about 270 s left",
        "answers: 2 of 10, about 240 s left",
        "maps: 4 of 6, about 40 s left",
    ]
