"""Test sets in their authors' formats, each as a small handwritten folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from babydoctor.config import TaskConfig
from babydoctor.eval.conditions import ConditionedImages, check_conditions, shuffle_images
from babydoctor.eval.formats import with_optional_parts
from babydoctor.eval.leakage import find_leakage
from babydoctor.eval.load import load_task
from babydoctor.eval.score import (
    CONSTANT_ANSWERS,
    MAJORITY_PER_TYPE,
    baseline_answers,
    is_right,
    majority_per_type,
    score_baselines,
    score_chance,
)
from babydoctor.eval.tasks import Question, Task
from babydoctor.imaging.preprocess import ImageSettings
from babydoctor.phantom.case import build_cases
from babydoctor.phantom.rows import question_rows
from babydoctor.schema import UserError


def _image(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24), (shade, shade, shade)).save(path)
    return path


def _json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _vqa_rad_row(**changes: Any) -> dict[str, Any]:
    row = {
        "qid": 1,
        "image_name": "a.jpg",
        "question": "Is it normal?",
        "answer": "Yes",
        "answer_type": "CLOSED ",
        "phrase_type": "test_freeform",
        "image_organ": "CHEST",
        "question_type": "PRSE, ABN",
    }
    return row | changes


def test_vqa_rad_splits_by_phrase_type(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "a.jpg")
    rows = [_vqa_rad_row(), _vqa_rad_row(qid=2, phrase_type="para", answer=4, answer_type="OPEN")]
    _json(tmp_path / "VQA_RAD.json", rows)
    test = load_task(TaskConfig(task="vqa-rad", data=str(tmp_path)))
    assert [q.kind for q in test.questions] == ["closed"]
    assert test.questions[0].groups == {"question_type": "PRES", "organ": "CHEST"}
    assert test.questions[0].yes_no_reference == "yes"
    assert "202 of its 203" in test.notes[0]
    train = load_task(TaskConfig(task="vqa-rad", data=str(tmp_path), split="train"))
    assert (train.questions[0].references, train.questions[0].kind) == (("4",), "open")
    assert test.fingerprint != train.fingerprint


def test_vqa_rad_without_test_rows_says_how_to_hold_out(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "a.jpg")
    _json(tmp_path / "VQA_RAD.json", [_vqa_rad_row(phrase_type="para")])
    with pytest.raises(UserError, match="hold-out-images"):
        load_task(TaskConfig(task="vqa-rad", data=str(tmp_path)))


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    _json(tmp_path / "VQA_RAD.json", [_vqa_rad_row()])
    with pytest.raises(UserError, match=r"1 images are missing, first .*a\.jpg.*--images"):
        load_task(TaskConfig(task="vqa-rad", data=str(tmp_path)))


def test_slake_uses_one_language(tmp_path: Path) -> None:
    _image(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    row = {
        "img_name": "xmlab1/source.jpg",
        "question": "What is it?",
        "answer": "MRI",
        "answer_type": "OPEN",
        "modality": "MRI",
        "location": "Abdomen",
        "content_type": "Modality",
    }
    _json(tmp_path / "test.json", [row | {"q_lang": "en", "qid": 1}, row | {"q_lang": "zh", "qid": 2}])
    task = load_task(TaskConfig(task="slake", data=str(tmp_path)))
    assert [q.id for q in task.questions] == ["1"]
    assert task.questions[0].groups == {"question_type": "Modality", "organ": "Abdomen", "modality": "MRI"}
    assert len(load_task(TaskConfig(task="slake", data=str(tmp_path), language="all")).questions) == 2


def test_path_vqa_reads_json_and_refuses_pickles(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "test_0001.jpg")
    (tmp_path / "test_qa.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_task(TaskConfig(task="path-vqa", data=str(tmp_path)))
    rows = [
        {"image": "test_0001", "question": "Is a cyst present?", "answer": "no"},
        {"image": "test_0001", "question": "What is shown?", "answer": "liver"},
    ]
    _json(tmp_path / "test.json", rows)
    task = load_task(TaskConfig(task="path-vqa", data=str(tmp_path)))
    assert [q.kind for q in task.questions] == ["closed", "open"]


def test_vqa_med_2019_alternatives_and_optional_text(tmp_path: Path) -> None:
    _image(tmp_path / "Images" / "synpic1.jpg")
    (tmp_path / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(
        "synpic1|abnormality|what is abnormal?|(invasive aspergillosis with) septic emboli#abscess\n"
        "synpic1|modality|is this a ct?|yes\n"
    )
    first, second = load_task(TaskConfig(task="vqa-med", data=str(tmp_path))).questions
    assert first.references == ("invasive aspergillosis with septic emboli", "septic emboli", "abscess")
    assert first.groups == {"question_type": "abnormality"}
    assert second.kind == "closed"


def test_vqa_med_2020_and_2021_answers_in_a_second_file(tmp_path: Path) -> None:
    _image(tmp_path / "VQA_Images" / "synpic1.jpg")
    (tmp_path / "VQAMed2020-Task1-VQAnswering-Test-Questions.txt").write_text("synpic1|what is wrong?\n")
    with pytest.raises(UserError, match="ReferenceAnswers"):
        load_task(TaskConfig(task="vqa-med", data=str(tmp_path)))
    answers = tmp_path / "VQAMed2020-Task1-VQAnswering-Test-ReferenceAnswers.txt"
    answers.write_text("synpic1|hernia (internal)#ileus|volvulus\n")
    (question,) = load_task(TaskConfig(task="vqa-med", data=str(tmp_path))).questions
    # Parentheses are optional text in 2019 only.
    assert question.references == ("hernia (internal)", "ileus", "volvulus")


def test_vqa_med_train_format(tmp_path: Path) -> None:
    _image(tmp_path / "Val_images" / "synpic1.jpg")
    (tmp_path / "All_QA_Pairs_val.txt").write_text("synpic1|what plane is it?|axial\n")
    (question,) = load_task(TaskConfig(task="vqa-med", data=str(tmp_path))).questions
    assert (question.prompt, question.references, question.kind) == ("what plane is it?", ("axial",), "open")


def test_optional_parts_by_hand() -> None:
    assert with_optional_parts("a (b) c (d)", True) == ["a b c d", "a b c", "a c d", "a c"]
    assert with_optional_parts("a (b)", False) == ["a (b)"]


def test_roco_whole_and_article_disjoint(tmp_path: Path) -> None:
    for split, rows in (("test", "12"), ("train", "3")):
        folder = tmp_path / split
        for number in rows:
            _image(folder / "images" / f"ROCO_{number}.jpg")
        (folder / "captions.txt").write_text("".join(f"ROCO_{n}\t Caption {n}. \n" for n in rows + "9"))
    (tmp_path / "test" / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\nROCO_1,PMC7_x.jpg,CC\nROCO_2,PMC8_y.jpg,CC\n")
    (tmp_path / "train" / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\nROCO_3,PMC7_z.jpg,CC BY\n")
    task = load_task(TaskConfig(task="roco", data=str(tmp_path / "test"), train=(str(tmp_path / "train"),)))
    assert [(q.id, q.references, q.subsets, q.cluster) for q in task.questions] == [
        ("ROCO_1", ("Caption 1.",), (), "PMC7"),
        ("ROCO_2", ("Caption 2.",), ("article_disjoint",), "PMC8"),
    ]
    assert any("1 captions have no image" in note for note in task.notes)
    assert any("1 of 2 images share an article" in note for note in task.notes)
    assert task.is_caption


def test_real_roco_captions(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "roco" / "validation" / "radiology"
    task = load_task(TaskConfig(task="roco", data=str(folder)))
    # Of the three images, one has no caption.
    assert len(task.questions) == 2
    assert all(question.cluster.startswith("PMC") for question in task.questions)


def test_every_turn_of_a_llava_row_is_asked(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "a.jpg")
    turns = [("human", "<image>\nIs it CT?"), ("gpt", "No"), ("human", "What then?"), ("gpt", "MRI")]
    row = {"id": "x", "image": "a.jpg", "conversations": [{"from": who, "value": text} for who, text in turns]}
    _json(tmp_path / "rows.json", [row])
    task = load_task(TaskConfig(task="rows", data=str(tmp_path / "rows.json"), prompt="Q: {question}"))
    assert [(q.id, q.prompt, q.kind) for q in task.questions] == [
        ("x-0", "Q: Is it CT?", "closed"),
        ("x-1", "Q: What then?", "open"),
    ]


def test_rows_of_other_trainers_are_asked_or_refused_by_name(tmp_path: Path) -> None:
    _image(tmp_path / "images" / "a.jpg")
    messages = [{"role": "user", "content": "<image>\nIs it CT?"}, {"role": "assistant", "content": "No"}]
    row = {"id": "x", "images": ["a.jpg"], "messages": messages}
    _json(tmp_path / "rows.json", [row])
    [question] = load_task(TaskConfig(task="rows", data=str(tmp_path / "rows.json"))).questions
    assert (question.prompt, question.image, question.kind) == ("Is it CT?", tmp_path / "images" / "a.jpg", "closed")
    for bad, named in (
        (row | {"video": "a.mp4"}, "video"),
        (row | {"images": ["a.jpg", "b.jpg"]}, "more than one image"),
        (row | {"system": "Be brief."}, "system prompt"),
        (row | {"messages": messages[:1]}, "turns do not go"),
        ([row], "not a LLaVA row"),
    ):
        _json(tmp_path / "rows.json", [row, bad])
        with pytest.raises(UserError, match=rf"rows\.json#1: .*{named}"):
            load_task(TaskConfig(task="rows", data=str(tmp_path / "rows.json")))


def test_phantom_answers_count_in_radiology_and_everyday_words(tmp_path: Path) -> None:
    from babydoctor.phantom.write import write_phantoms

    write_phantoms(tmp_path, num_train=1, num_held_out=4, seed=0, size=56)
    task = load_task(TaskConfig(task="phantom", data=str(tmp_path)))
    modality = next(q for q in task.questions if q.groups["question_type"] == "modality")
    assert len(modality.references) == 2
    assert modality.references[1].startswith("This is ")
    for trick in ("CT MRI", "CT or MRI", "", "This is"):
        assert not is_right(modality, trick), trick


def test_chance_is_the_best_constant_answer_to_each_type() -> None:
    rows = [row for case in build_cases("held_out", 480, 7) for row in question_rows(case)]
    questions = [
        Question(row["id"], None, row["image"], "", (row["answer"],), "closed", {"question_type": row["kind"]})
        for row in rows
    ]
    chance = score_chance(questions)
    assert chance is not None
    assert chance["by_question_type"] == {
        "modality": 0.25,
        "finding": 0.2,
        "side": 0.5,
        "level": pytest.approx(1 / 3),
    }
    assert chance["closed_accuracy"] == pytest.approx(536 / 1728)
    baselines = score_baselines(Task("phantom", tuple(questions)))
    assert baselines[MAJORITY_PER_TYPE]["closed_accuracy"] == pytest.approx(536 / 1728)
    assert score_chance([replace(question, kind="open") for question in questions]) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(task="vqa", data="x"), "there are vqa-rad"),
        (TaskConfig(task="slake", data="/nowhere"), "no such file or folder"),
        (TaskConfig(task="rows", data="/nowhere.json"), "no such file"),
        (TaskConfig(task="phantom", data="/nowhere"), "data phantom"),
        (TaskConfig(task="roco", data="/nowhere"), r"captions\.txt"),
        (TaskConfig(task="roco", data="hub"), "give a folder"),
        (TaskConfig(task="rows", data="x", prompt="hello"), r"\{question\}"),
    ],
)
def test_wrong_arguments_are_named(config: TaskConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(config)


def test_an_offline_hub_is_named() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="hf download"):
        load_task(TaskConfig(task="path-vqa", data="hub"))


def _question(identity: str, answer: str, kind: Any = "closed", group: str = "PRES", image: str = "") -> Question:
    return Question(identity, None, image or identity, "q", (answer,), kind, {"question_type": group})


def test_baselines_are_the_strongest_constants() -> None:
    questions = [
        _question("1", "Yes"),
        _question("2", "yes."),
        _question("3", "no"),
        _question("4", "axial", "open", "PLANE"),
        _question("5", "no", group="ABN"),
    ]
    assert majority_per_type(questions) == ["yes", "yes", "yes", "axial", "no"]
    answers = baseline_answers(questions)
    assert set(CONSTANT_ANSWERS) < set(answers)
    assert answers["most frequent answer"] == ["no"] * 5  # two of each, so the first in the alphabet


def test_a_shuffled_image_is_never_the_questions_own() -> None:
    keys = [f"image{number}" for number in range(50)]
    mapping = shuffle_images(keys, seed=0)
    assert sorted(mapping.values()) == sorted(keys)
    assert all(key != other for key, other in mapping.items())
    assert mapping == shuffle_images(list(reversed(keys)), seed=0)
    with pytest.raises(UserError, match="1 image"):
        shuffle_images(["a", "a"], seed=0)


def test_shuffled_images_come_from_questions_of_the_same_group(tmp_path: Path) -> None:
    settings = ImageSettings(size=28, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    shades = {"a": 10, "b": 60, "c": 110, "d": 160}
    files = {name: _image(tmp_path / f"{name}.png", shade) for name, shade in shades.items()}

    def asked(name: str, group: str) -> Question:
        return Question(f"{name}{group}", files[name], name, "q", ("yes",), "closed", shuffled_among=group)

    every = [asked(name, "") for name in shades]
    questions = [*every, asked("a", "finding"), asked("b", "finding")]
    right, shuffled = (ConditionedImages(questions, condition, settings) for condition in ("right", "shuffled"))
    np.testing.assert_array_equal(shuffled.pixels(questions[4]), right.pixels(every[1]))
    np.testing.assert_array_equal(shuffled.pixels(questions[5]), right.pixels(every[0]))
    # A group of one image takes another image of the test.
    alone = ConditionedImages([*every, asked("a", "finding")], "shuffled", settings).pixels(asked("a", "finding"))
    assert not np.array_equal(alone, right.pixels(every[0]))


def test_conditions_change_the_pixels(tmp_path: Path) -> None:
    settings = ImageSettings(size=28, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    questions = [
        Question(name, _image(tmp_path / f"{name}.png", shade), name, "q", ("yes",), "closed")
        for name, shade in (("a", 255), ("b", 0))
    ]
    pixels = {
        condition: ConditionedImages(questions, condition, settings).pixels(questions[0])
        for condition in check_conditions(["shuffled", "blank", "noise"])
    }
    assert all(value is not None and value.shape == (3, 28, 28) for value in pixels.values())
    assert pixels["right"].max() == pytest.approx(2.0)  # type: ignore[union-attr]
    assert pixels["shuffled"].min() == pytest.approx(-2.0)  # type: ignore[union-attr]
    assert not pixels["blank"].any()  # type: ignore[union-attr]
    again = ConditionedImages(questions, "noise", settings).pixels(questions[0])
    np.testing.assert_array_equal(pixels["noise"], again)
    with pytest.raises(UserError, match="no such condition"):
        check_conditions(["upside-down"])


def test_leakage_by_name_and_by_bytes(tmp_path: Path) -> None:
    same = _image(tmp_path / "test" / "a.png", 10)
    other = _image(tmp_path / "test" / "b.png", 20)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "renamed.png").write_bytes(same.read_bytes())
    _image(tmp_path / "train" / "b.png", 99)
    conversation = [{"from": "human", "value": "<image>\nIs it CT?"}, {"from": "gpt", "value": "no"}]
    rows = _json(
        tmp_path / "train.json",
        [
            {"id": 1, "image": "renamed.png", "conversations": conversation},
            {"id": 2, "image": "b.png", "conversations": conversation},
        ],
    )
    questions = [
        Question("1", same, "a.png", "Is it CT?", ("no",), "closed"),
        Question("2", other, "b.png", "Is it CT?", ("no",), "closed"),
    ]
    found = find_leakage(questions, [str(rows)], str(tmp_path / "train"))
    assert (found["num_same_name"], found["num_same_bytes"], found["num_seen"]) == (1, 1, 2)
    assert found["num_same_question"] == 1
    assert find_leakage(questions, [])["checked"] is False


def test_question_ids_are_unique(tmp_path: Path) -> None:
    row = {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    _json(tmp_path / "rows.json", [row, row])
    with pytest.raises(UserError, match="twice"):
        load_task(TaskConfig(task="rows", data=str(tmp_path / "rows.json")))


def test_the_fingerprint_depends_on_the_questions() -> None:
    one, two = Task("t", (_question("1", "yes"),)), Task("t", (_question("1", "no"),))
    assert one.fingerprint == Task("u", (_question("1", "yes"),)).fingerprint != two.fingerprint
