"""An exported session is rendered again from its files and asked again."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.serving import tiny_run
from helpers.study_files import ct_slice, zipped
from helpers.web_ui import PATIENT
from PIL import Image
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.imaging.burned_in import TextBox
from babydoctor.schema import Turn, UserError
from babydoctor.serve.page.feedback import export_session
from babydoctor.serve.page.replay.ask import ask_run
from babydoctor.serve.page.replay.images import replay_views
from babydoctor.serve.page.replay.session_file import read_session
from babydoctor.serve.page.session import AnswerSettings, Exchange, Session
from babydoctor.serve.page.study.study import StudyReader
from babydoctor.serve.page.viewer.arrangement import Arrangement

PLACES = (2, 0, 1)
SAMPLING = AnswerSettings(0, 1, 16)


def recorded(answers: tuple[str, str] = ("one", "two")) -> Session:
    """A session about a series: a question about the middle image, and one about an arranged view of the last one."""
    reader = StudyReader()
    for place in PLACES:
        reader.add(ct_slice(place))
    study = reader.study()
    scan = study.series[0].scan
    session = Session(has_accepted=True)
    session.load(scan)
    session.study = study
    for number, question in enumerate(("What is this?", "And here?")):
        if number == 1:
            scan.frame, scan.preset = 2, "bone"
            scan.arrangement = Arrangement(True, True, 1, (10, 20, 90, 100))
            scan.text.boxes[2] = [TextBox(30, 40, 60, 50, "name", text=PATIENT)]
        exchange = Exchange(question, "tiny", SAMPLING, scan.view(), answer=answers[number], ended="stop")
        exchange.turns = tuple(session.turns(question))
        session.exchanges.append(exchange)
    return session


@pytest.fixture(scope="module")
def export() -> str:
    return export_session(recorded())


def write(folder: Path, text: str) -> Path:
    path = folder / "session.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_export_holds_hashes_and_the_state_but_no_identifier(export: str) -> None:
    block = re.search(r'<script type="application/json" id="session">(.*?)</script>', export, re.S)
    assert block is not None
    first, second = (view["state"] for view in json.loads(block[1])["views"])
    assert len(first["file"]) == len(first["instance"]) == len(first["series"]) == 64
    assert first["series"] == second["series"] and first["instance"] != second["instance"]
    assert second["window"]["preset"] == "bone" and second["region"] == [10, 20, 90, 100]
    assert second["hidden"] == [[30, 40, 60, 50]] and second["quarter_turns"] == 1
    assert PATIENT not in export and "1.2.3" not in export


def test_the_same_pixels_are_rendered_from_the_files(export: str, tmp_path: Path) -> None:
    session = read_session(write(tmp_path, export))
    images = tmp_path / "images"
    images.mkdir()
    (images / "study.zip").write_bytes(zipped([ct_slice(place) for place in PLACES]))
    (images / "notes.txt").write_text("no image")
    assert [view.status for view in replay_views(session, images)] == ["same", "same"]
    assert [view.status for view in replay_views(session, None)] == ["from_export", "from_export"]
    # The turns of the second question: the first question with the image, then the recorded answer.
    assert session.answers[1].turns == (
        Turn("user", "<image>\nWhat is this?"),
        Turn("assistant", "one"),
        Turn("user", "And here?"),
    )


def test_other_pixels_and_missing_files_are_named(export: str, tmp_path: Path) -> None:
    session = read_session(write(tmp_path, export))
    images = tmp_path / "images"
    images.mkdir()
    # The same instance in another file: once with a new comment, once with other pixels.
    (images / "a").write_bytes(ct_slice(1, ImageComments="rewritten"))
    first, second = replay_views(session, images)
    assert first.status == "same" and "same DICOM instance with other bytes" in first.note
    assert second.status == "not_found" and second.png is None
    values = np.zeros((128, 128), np.int16)
    (images / "a").write_bytes(ct_slice(1, PixelData=values.tobytes()))
    changed = replay_views(session, images)[0]
    assert changed.status == "differs" and "of the pixels differ, by at most" in changed.note
    with pytest.raises(UserError, match="no such folder"):
        replay_views(session, tmp_path / "nowhere")


def test_an_image_that_was_changed_in_the_export_is_noticed(export: str, tmp_path: Path) -> None:
    session = read_session(write(tmp_path, export))
    buffer = io.BytesIO()
    Image.new("RGB", (128, 128)).save(buffer, "PNG")
    views = (dataclasses.replace(session.views[0], png=buffer.getvalue()), session.views[1])
    assert replay_views(dataclasses.replace(session, views=views), None)[0].status == "differs"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "holds no session"),
        ("{}", "the format is None"),
        ('{"format": "babydoctor-session-1", "views": [{"caption": ""}], "exchanges": []}', "older versions"),
    ],
)
def test_other_files_are_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_session(write(tmp_path, text))
    assert "session.html" in str(caught.value)


def test_the_command_asks_a_run_again_and_compares(tmp_path: Path) -> None:
    path = write(tmp_path, export_session(recorded()))
    session = read_session(path)
    new = ask_run(tiny_run(), session.answers, replay_views(session, None), engine={}, tell=lambda done: None)
    path = write(tmp_path, export_session(recorded((new[0].text, "something else"))))
    images = tmp_path / "images"
    images.mkdir()
    for place in PLACES:
        (images / str(place)).write_bytes(ct_slice(place))
    result = CliRunner().invoke(
        build_app(), ["replay", str(path), "--images", str(images), "--run", str(tiny_run())], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("rendered again: the same pixels") == 2
    assert "Recorded" in result.output and "something else" in result.output
    assert re.search(r"What is this\?.*\bsame\b", result.output)
    assert re.search(r"And here\?.*\bdiffers\b", result.output)
    (images / "1").unlink()
    result = CliRunner().invoke(build_app(), ["replay", str(path), "--images", str(images)])
    assert result.exit_code == 1 and "missing" in result.output
