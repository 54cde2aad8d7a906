"""Reading rows: which are accepted, which are refused and why, and the order of samples in training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers.image_files import plain_png
from PIL import Image

from babydoctor.data.images import read_image
from babydoctor.data.loader import StepSampler
from babydoctor.data.problems import REASONS, Problem, RowError
from babydoctor.data.rows import (
    check_rows,
    fingerprint,
    image_first,
    load_dataset_rows,
    load_rows,
    parse_row,
)
from babydoctor.data.sources import iter_rows
from babydoctor.schema import Sample, Turn, UserError


def row(
    id: str = "1", image: str | None = "a.png", question: str = "What?\n<image>", answer: str = "CT."
) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": id,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    return value | ({"image": image} if image is not None else {})


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), (200, 10, 10)).save(folder / "a.png")
    Image.new("L", (8, 8), 90).save(folder / "sub" / "b.jpg")
    return folder


def write_json(path: Path, rows: Any) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def test_the_image_goes_to_the_front() -> None:
    for question in ("What?\n<image>", "<image>\nWhat?", "<image> What?", "Wh<image>at?"):
        assert parse_row(row(question=question), "x").turns == (
            Turn("user", "<image>\nWhat?"),
            Turn("assistant", "CT."),
        )
    assert image_first("<image>") == "<image>"


def test_text_only_rows_and_other_columns_are_accepted() -> None:
    sample = parse_row(row(image=None, question=" Hello? ") | {"image": None, "model": "x"}, "f.json#3")
    assert sample == Sample("1", (Turn("user", " Hello? "), Turn("assistant", "CT.")), None, "f.json#3")
    assert parse_row({"id": 7, "conversations": turns("a", "b")}, "x").id == "7"
    assert parse_row({"conversations": turns("a", "b")}, "x#9").id == "x#9"


BAD = {
    "not_a_row": ["text", {"id": "1"}, {"conversations": []}, {"id": "1", "conversations": {"from": "human"}}],
    "bad_turn": [
        {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
        {"id": "1", "conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"id": "1", "conversations": ["a", "b"]},
        row(answer="half \ud800 pair"),
    ],
    "system_turn": [
        {"id": "1", "conversations": [*turns("a", "b"), {"from": "system", "value": "be kind"}, *turns("a", "b")]},
        {"id": "1", "system": "x", "conversations": [{"from": "system", "value": "y"}, *turns("a", "b")]},
    ],
    "turn_order": [
        {"id": "1", "conversations": turns("a")},
        {"id": "1", "conversations": turns("a", "b", "c")},
        {"id": "1", "conversations": turns("a", "b")[::-1]},
        {"id": "1", "conversations": turns("a", "b")[:1] * 2},
    ],
    "empty_answer": [row(answer=" \n")],
    "empty_question": [{"id": "1", "conversations": turns("", "b")}],
    "image_token_missing": [row(question="What?")],
    "image_token_without_image": [row(image=None)],
    "image_token_repeated": [
        row(question="<image>\n<image>"),
        row() | {"conversations": turns("<image>", "b", "<image>", "d")},
    ],
    "image_token_misplaced": [
        row(question="a", answer="<image>"),
        row() | {"conversations": turns("a", "b", "<image>", "d")},
    ],
    "image_path": [row(image=3), row(image=["a.png"])],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_a_malformed_row_is_refused_with_its_reason(reason: str) -> None:
    for index, bad in enumerate(BAD[reason]):
        with pytest.raises(RowError) as caught:
            parse_row(bad, f"rows.json#{index}")
        assert caught.value.problem.reason == reason, bad
        assert f"rows.json#{index}" in str(caught.value) and REASONS[reason] in str(caught.value)


def test_image_paths_cannot_leave_the_folder(images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (4, 4)).save(secret)
    (images / "link.png").symlink_to(secret)
    (images / "folder").symlink_to(tmp_path)
    (images / "inner.png").symlink_to(images / "a.png")
    for bad in (
        "/etc/passwd",
        "../secret.png",
        "sub/../../secret.png",
        "link.png",
        "folder/secret.png",
        "",
        "a\0.png",
        "..\\s",
    ):
        [problem] = check_rows([("r", row(image=bad))], images)
        assert isinstance(problem, Problem) and problem.reason == "image_path", bad
        with pytest.raises(UserError):
            read_image(bad, images)
    [good] = check_rows([("r", row(image="inner.png"))], images)
    assert isinstance(good, Sample)


def test_a_folder_that_is_itself_a_link_is_fine(images: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(images)
    [sample] = check_rows([("r", row(image="sub/b.jpg"))], tmp_path / "elsewhere")
    assert isinstance(sample, Sample)


def test_missing_files_directories_and_odd_names_are_missing_images(images: Path) -> None:
    for bad in ("none.png", "sub", "a.png/x", "n" * 300, "\ud800.png"):
        [problem] = check_rows([("r", row(image=bad))], images)
        assert isinstance(problem, Problem) and problem.reason == "image_missing", bad


def test_duplicates_are_whole_rows_not_ids(images: Path) -> None:
    rows = [("r0", row()), ("r1", row()), ("r2", row(answer="MR.")), ("r3", row(id="2"))]
    results = list(check_rows(rows, images))
    assert [isinstance(result, Sample) for result in results] == [True, False, True, True]
    assert isinstance(results[1], Problem) and (results[1].reason, results[1].detail) == ("duplicate", "of r0")


def test_rows_with_images_need_an_image_folder(images: Path) -> None:
    with pytest.raises(UserError, match=r"data\.images"):
        list(check_rows([("r", row())], None))
    with pytest.raises(UserError, match="no such directory"):
        list(check_rows([("r", row())], images / "none"))


def test_training_refuses_bad_rows_or_leaves_them_out(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(), row("2", answer=""), row("3", "gone.png"), row("4", answer="MR."), row("5", answer=" ")]
    path = write_json(tmp_path / "rows.json", rows)
    with pytest.raises(UserError) as caught:
        load_dataset_rows(path, str(images), "refuse")
    message = str(caught.value)
    assert "3 of 5 rows are bad" in message and "2 empty_answer" in message and "1 image_missing" in message
    assert "data check" in message and "data.on_bad=quarantine" in message and f"{path}#1" in message

    bad = tmp_path / "run" / "bad.jsonl"
    with caplog.at_level(logging.WARNING):
        samples = load_dataset_rows([path], str(images), "quarantine", bad)
    assert [sample.id for sample in samples] == ["1", "4"]
    listed = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [item["reason"] for item in listed] == ["empty_answer", "image_missing", "empty_answer"]
    assert listed[0]["source"] == f"{path}#1" and "3 of 5 rows are bad" in caplog.text
    with pytest.raises(UserError, match="refuse or quarantine"):
        load_dataset_rows(path, str(images), "ignore")
    with pytest.raises(UserError, match="no good row"):
        load_dataset_rows(write_json(tmp_path / "none.json", [row(answer="")]), str(images), "quarantine")


def test_json_lists_are_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(str(i), answer=f'Ä{i} "quoted" }} ] , \\ ' * (i % 7 + 1)) for i in range(300)]
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
        "\ufeff \n" + json.dumps(rows) + "\n",
    ):
        path.write_text(text, encoding="utf-8")
        for chunk in (7, 64, 1000, 1 << 20):
            monkeypatch.setattr("babydoctor.data.json_rows._CHUNK_CHARS", chunk)
            assert [r for _, r in iter_rows(path)] == rows
    path.write_text("[]")
    assert list(iter_rows(path)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "1"}, {"id": ', "row 1 is not valid JSON.*cut off"),
        ('[{"id": "1"},', "cut off"),
        ('[{"id": "1"}', "cut off"),
        ("", "cut off"),
        ('[{"id": "1"} {"id": "2"}]', "found '{' instead of ','"),
        ('[{"id": "1"}, {"id": nope}, {"id": "a long enough text after it"}]', "row 1 .*fix the row"),
        ("[" * 100_000, "nested too deeply|cut off"),
    ],
)
def test_errors_in_json_lists_give_the_position(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        list(iter_rows(path))


def test_jsonl_lines_that_are_not_json_are_separate_problems(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n\n{broken\n" + json.dumps(row("2")) + "\n")
    results = list(check_rows(load_rows(path), images))
    assert [type(result) for result in results] == [Sample, Problem, Sample]
    assert isinstance(results[1], Problem) and results[1].reason == "not_json" and results[1].source == f"{path}:3"


def test_other_encodings_and_missing_sources_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(iter_rows(path))
    with pytest.raises(UserError, match="no such file"):
        list(iter_rows(tmp_path / "none.json"))


def test_saved_data_sets_with_embedded_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    content = {
        "id": ["a", "b", "c"],
        "image": [{"bytes": plain_png(10), "path": None}, None, {"bytes": plain_png(30), "path": None}],
        "conversations": [turns("<image>", "x"), turns("q", "y"), turns("q\n<image>", "z", "more?", "no")],
    }
    data = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "validation": data.select([2, 1])}).save_to_disk(tmp_path / "dict")
    samples = load_dataset_rows(str(tmp_path / "saved"), None)
    assert [sample.id for sample in samples] == ["a", "b", "c"] and samples[1].image is None
    assert [read_image(s.image, None).getpixel((0, 0)) for s in samples if s.image] == [(10, 0, 0), (30, 0, 0)]
    other = load_dataset_rows(f"{tmp_path / 'dict'}:validation", None)
    assert [sample.id for sample in other] == ["c", "b"]
    assert other[0].image is not None and read_image(other[0].image, None).getpixel((0, 0)) == (30, 0, 0)
    with pytest.raises(UserError, match="train, validation"):
        load_dataset_rows(f"{tmp_path / 'dict'}:test", None)


def test_parquet_with_file_names_or_plain_bytes(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = json.dumps(turns("<image>", "y"))
    named = datasets.Dataset.from_dict({"id": ["a"], "image": ["a.png"], "conversations": [text]})
    named.to_parquet(tmp_path / "named.parquet")
    [sample] = load_dataset_rows(str(tmp_path / "named.parquet"), images)
    assert sample.image == "a.png" and sample.turns[0].text == "<image>"
    (tmp_path / "folder").mkdir()
    plain = datasets.Dataset.from_dict({"id": ["a"], "image": [plain_png(7)], "conversations": [turns("<image>", "y")]})
    plain.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    [sample] = load_dataset_rows(str(tmp_path / "folder"), None)
    assert sample.image is not None and read_image(sample.image, None).getpixel((0, 0)) == (7, 0, 0)


def test_images_in_the_sample_itself_are_read(images: Path) -> None:
    sample = parse_row(row() | {"image": plain_png(9)}, "x")
    assert isinstance(sample.image, bytes) and read_image(sample.image, None).size == (5, 4)
    assert read_image("sub/b.jpg", images).mode == "RGB"


def test_every_epoch_takes_every_sample_once_in_a_new_order() -> None:
    sampler = StepSampler(num_samples=103, batch_size=8, seed=3)
    assert sampler.steps_per_epoch == 13
    epochs = [[i for step in range(13) for i in sampler.samples_of_step(epoch * 13 + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(sampler.samples_of_step(12)) == 7


def test_the_step_number_determines_the_samples() -> None:
    straight = StepSampler(50, 7, seed=1)
    steps = [straight.samples_of_step(step) for step in range(24)]
    assert [StepSampler(50, 7, seed=1).samples_of_step(step) for step in (23, 0, 9, 8)] == [
        steps[i] for i in (23, 0, 9, 8)
    ]
    assert StepSampler(50, 7, seed=2).samples_of_step(0) != steps[0]


def test_the_fingerprint_sees_ids_text_images_and_order() -> None:
    a, b = parse_row(row(), "x"), parse_row(row("2"), "y")
    assert fingerprint([a, b]) == fingerprint([parse_row(row(), "elsewhere"), b])
    others = [[b, a], [a], [a, parse_row(row("2", "b.png"), "y")], [a, parse_row(row("2", answer="MR."), "y")]]
    assert len({fingerprint(other) for other in [[a, b], *others]}) == 5


def test_real_rows_of_the_golden_references_parse(golden: Path) -> None:
    lines = (golden / "expected" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        conversations = json.loads(line)["turns"]
        image = {"image": "a.png"} if "<image>" in conversations[0]["value"] else {}
        sample = parse_row({"id": str(index), "conversations": conversations} | image, "golden")
        assert len(sample.turns) == len(conversations)


def test_the_fingerprint_of_rows_without_ids_does_not_depend_on_their_file() -> None:
    without_id = {key: value for key, value in row().items() if key != "id"}
    first, moved = (parse_row(without_id, source) for source in ("/old/rows.json#0", "/new/rows.json#0"))
    assert first.id != moved.id and fingerprint([first]) == fingerprint([moved])
