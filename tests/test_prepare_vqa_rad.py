"""VQA-RAD's official JSON as rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from babydoctor.data.rows import Sample, check_rows, load_rows
from babydoctor.data.sets.vqa_rad import prepare_vqa_rad
from babydoctor.schema import UserError


def question(qid: Any, image: str, phrase_type: str = "freeform", **change: Any) -> dict[str, Any]:
    return {
        "qid": qid,
        "image_name": image,
        "question": " Is it a CT? ",
        "answer": "Yes",
        "answer_type": "CLOSED ",
        "question_type": "MODALITY",
        "phrase_type": phrase_type,
        "image_organ": "HEAD",
        "evaluation": "evaluated",
    } | change


def write_set(folder: Path, questions: list[dict[str, Any]], images: list[str]) -> Path:
    (folder / "VQA_RAD Image Folder").mkdir(parents=True)
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(questions))
    (folder / "notes.json").write_text("{}")
    for name in images:
        Image.new("L", (8, 8)).save(folder / "VQA_RAD Image Folder" / name)
    return folder


def test_official_rows_keep_their_question_types(tmp_path: Path) -> None:
    questions = [
        question(0, "a.jpg"),
        question("1", "a.jpg", "test_freeform", answer=4),
        question(2, "gone.jpg"),
        question(3, "b.jpg", "test_para", answer=" "),
        question(4, "b.jpg", "para"),
    ]
    train, test = prepare_vqa_rad(write_set(tmp_path / "in", questions, ["a.jpg", "b.jpg"]), tmp_path / "out")
    rows = json.loads(train.rows.read_text())
    assert rows[0] == {
        "id": "vqa-rad-0",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nIs it a CT?"}, {"from": "gpt", "value": "Yes"}],
        "qid": "0",
        "question_type": "MODALITY",
        "answer_type": "CLOSED",
        "phrase_type": "freeform",
        "image_organ": "HEAD",
    }
    assert [row["id"] for row in rows] == ["vqa-rad-0", "vqa-rad-4"]
    [row] = json.loads(test.rows.read_text())
    assert row["conversations"][1]["value"] == "4" and test.notes == ("1 of its 1 images are also in train",)
    assert train.left_out == {"no_image": 1, "no_answer": 1}
    assert all(isinstance(result, Sample) for result in check_rows(load_rows(train.rows), train.images))


def test_held_out_images_are_in_one_split_only(tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(10)]
    source = write_set(tmp_path / "in", [question(i, names[i % 10]) for i in range(40)], names)
    train, held_out = prepare_vqa_rad(source, tmp_path / "out", hold_out_images=0.3, seed=1)
    sides = [{row["image"] for row in json.loads(part.rows.read_text())} for part in (train, held_out)]
    assert len(sides[0]) == 7 and len(sides[1]) == 3 and not sides[0] & sides[1]
    assert (train.num_rows, held_out.num_rows) == (28, 12)
    again = prepare_vqa_rad(source, tmp_path / "again", hold_out_images=0.3, seed=1)
    assert again[1].rows.read_text() == held_out.rows.read_text()
    other = prepare_vqa_rad(source, tmp_path / "other", hold_out_images=0.3, seed=2)
    assert other[1].rows.read_text() != held_out.rows.read_text()
    with pytest.raises(UserError, match=r"1\.5: must be"):
        prepare_vqa_rad(source, tmp_path / "out", hold_out_images=1.5)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(UserError, match="no JSON file with VQA-RAD's questions"):
        prepare_vqa_rad(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match=r"a\.jpg is in none of the 2 folders"):
        prepare_vqa_rad(write_set(tmp_path / "in", [question(0, "a.jpg")], []), tmp_path / "out")
    (tmp_path / "in" / "cut.json").write_text("[{")
    with pytest.raises(UserError, match=r"cut\.json: not valid JSON"):
        prepare_vqa_rad(tmp_path / "in", tmp_path / "out")


def test_the_real_training_questions(shared_dir: Path, tmp_path: Path) -> None:
    [train] = prepare_vqa_rad(shared_dir / "data" / "vqa-rad", tmp_path)
    assert (train.num_rows, train.num_read, train.num_expected, train.num_images) == (1_797, 1_797, 1_797, 313)
    assert not train.left_out
    rows = json.loads(train.rows.read_text())
    assert Counter(row["answer_type"] for row in rows) == {"CLOSED": 1_027, "OPEN": 770}
    assert len({row["id"] for row in rows}) == 1_797
    results = list(check_rows(load_rows(train.rows), train.images))
    assert all(isinstance(result, Sample) for result in results)
    train, held_out = prepare_vqa_rad(shared_dir / "data" / "vqa-rad", tmp_path / "b", hold_out_images=0.1)
    assert train.num_rows + held_out.num_rows == 1_797 and held_out.num_images == 31
