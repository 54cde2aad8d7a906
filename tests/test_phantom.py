"""Phantoms are deterministic, balanced, correct, and written in the formats of the real training sets."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from babydoctor.eval.metrics import normalize
from babydoctor.phantom import rows, text
from babydoctor.phantom.asking import expand, load_wordings, misspell, restyle
from babydoctor.phantom.case import FINDINGS, MODALITIES, Case, build_cases, load_cases
from babydoctor.phantom.drawing import draw
from babydoctor.phantom.write import write_phantoms
from babydoctor.schema import IMAGE_TOKEN, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms")
    write_phantoms(out, num_train=48, num_held_out=24, seed=3, size=84)
    return out


def make_case(**changes: object) -> Case:
    values: dict[str, object] = {
        "id": "phantom-train-00000",
        "split": "train",
        "image": "train_00000.png",
        "modality": "radiograph",
        "finding": "nodule",
        "side": "left",
        "level": "upper",
        "size": "large",
        "size_mm": 52.0,
        "noise_seed": 5,
    }
    return Case(**(values | changes))  # type: ignore[arg-type]


def test_the_seed_determines_the_bytes(folder: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "again", num_train=48, num_held_out=24, seed=3, size=84)
    write_phantoms(tmp_path / "other", num_train=48, num_held_out=24, seed=4, size=84)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 72 + 6 + 2
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    assert (folder / "truth.jsonl").read_bytes() != (tmp_path / "other/truth.jsonl").read_bytes()


def test_held_out_cases_do_not_depend_on_the_number_of_train_cases_and_never_repeat_one() -> None:
    few, many = build_cases("held_out", 24, 3), build_cases("held_out", 480, 3)
    assert few == many[:24]
    train = build_cases("train", 4800, 3)
    assert not {case.noise_seed for case in train} & {case.noise_seed for case in many}


def test_every_combination_is_equally_frequent() -> None:
    cases = build_cases("held_out", 480, 0)
    assert set(Counter(case.modality for case in cases).values()) == {480 // len(MODALITIES)}
    assert set(Counter(case.finding for case in cases).values()) == {480 // len(FINDINGS)}
    found = [case for case in cases if case.finding != "none"]
    combinations = Counter((c.modality, c.finding, c.side, c.level, c.size) for c in found)
    assert set(combinations.values()) == {2} and len(combinations) == 4 * 4 * 2 * 3 * 2
    assert all(case.side is case.level is case.size is case.size_mm is None for case in cases if case.finding == "none")


def changed_pixels(**changes: object) -> np.ndarray:
    """Where a case clearly differs from the same patient without a finding."""
    ill, well = make_case(**changes), make_case(**(changes | {"finding": "none"}))
    return np.abs(draw(ill, 84).astype(float) - draw(well, 84).astype(float)) > 60


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_patients_left_is_on_the_viewers_right(modality: str) -> None:
    assert np.nonzero(changed_pixels(modality=modality, side="left"))[1].mean() > 42 + 8
    assert np.nonzero(changed_pixels(modality=modality, side="right"))[1].mean() < 42 - 8


def test_a_finding_changes_only_pixels_near_it() -> None:
    ill, well = make_case(), make_case(finding="none")
    difference = np.abs(draw(ill, 84).astype(float) - draw(well, 84).astype(float))
    assert difference.max() > 60 and not difference[:, :40].any()


def test_the_level_is_the_height_and_a_large_finding_is_larger() -> None:
    heights = [np.nonzero(changed_pixels(level=level))[0].mean() for level in ("upper", "middle", "lower")]
    assert heights[0] + 8 < heights[1] < heights[2] - 8
    assert changed_pixels(size_mm=52.0).sum() > 1.7 * changed_pixels(size_mm=28.0).sum()


def test_rows_are_llava_json_with_the_image_once_in_the_first_turn(folder: Path) -> None:
    names = {path.name for path in (folder / "images").iterdir()}
    for split in ("train", "held_out"):
        for name in ("align", "instruct", "radiology"):
            rows = json.loads((folder / f"{name}_{split}.json").read_text())
            assert len({row["id"] for row in rows}) == len(rows)
            for row in rows:
                speakers = [turn["from"] for turn in row["conversations"]]
                assert speakers == ["human", "gpt"] * (len(speakers) // 2)
                counts = [turn["value"].count(IMAGE_TOKEN) for turn in row["conversations"]]
                assert counts == [int("image" in row)] + [0] * (len(counts) - 1)
                if "image" in row:
                    assert row["image"] in names and row["image"].startswith(split)


def test_the_images_are_gray_pngs_of_the_asked_size(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (84, 84))


def test_every_scored_answer_is_true_and_asked_in_a_wording_of_the_training_sets(folder: Path) -> None:
    cases = {case.image: case for case in load_cases(folder, "held_out")}
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    wordings = {
        turn["value"].replace(IMAGE_TOKEN, "").strip()
        for name in ("instruct", "radiology")
        for row in json.loads((folder / f"{name}_train.json").read_text())
        for turn in row["conversations"]
    }
    for row in questions:
        truth = getattr(cases[row["image"]], row["kind"])
        assert row["truth"] == truth
        assert text.TERMS[row["kind"]][truth] == row["answer"]
        assert row["question"].replace(IMAGE_TOKEN, "").strip() in wordings
    asked = Counter(row["kind"] for row in questions)
    num_found = sum(case.finding != "none" for case in cases.values())
    assert asked == {"modality": 24, "finding": 24, "side": num_found, "level": num_found}


def possible_answers(kind: str, value: str) -> set[str]:
    """All correct answers to a closed question, as the evaluation compares them."""
    return {normalize(answer) for answer in (text.TERMS[kind][value], text.lay_answer(kind, value))}


def test_no_answer_is_correct_for_two_values() -> None:
    for kind in text.KINDS:
        for value, other in itertools.permutations(text.TERMS[kind], 2):
            assert not possible_answers(kind, value) & possible_answers(kind, other)


def test_reports_use_radiology_terms_and_conversations_do_not(folder: Path) -> None:
    def answers(name: str) -> str:
        rows = [row for row in json.loads((folder / f"{name}_train.json").read_text()) if "image" in row]
        return " ".join(t["value"] for row in rows for t in row["conversations"] if t["from"] == "gpt").lower()

    lay, terse = answers("instruct") + answers("align"), answers("radiology")
    for word in ("nodule", "effusion", "fracture", "radiograph", "sonogram", "zone"):
        assert word in terse and word not in lay
    for word in ("lump", "bubble", "x-ray", "magnet"):
        assert word in lay and word not in terse


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_case_is_the_same_picture_at_every_size(modality: str) -> None:
    for finding in FINDINGS:
        case = make_case(modality=modality, finding=finding)
        small = draw(case, 84).astype(float)
        for size in (112, 224, 512):
            shrunk = Image.fromarray(draw(case, size)).resize((84, 84), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(shrunk, float) - small).mean() < 0.12 * small.std(), (finding, size)


def test_each_kind_of_request_has_many_wordings_and_held_out_ones_are_never_trained_on(folder: Path) -> None:
    wordings, rng = load_wordings(), np.random.default_rng(0)

    def expanded(patterns: tuple[str, ...]) -> set[str]:
        return {normalize(expand(pattern, "none", rng)) for pattern in patterns for _ in range(60)}

    asked = {
        normalize(turn["value"].replace(IMAGE_TOKEN, ""))
        for name in ("instruct", "radiology")
        for row in json.loads((folder / f"{name}_train.json").read_text())
        for turn in row["conversations"]
        if turn["from"] == "human"
    }
    assert set(wordings.trained) == set(wordings.held_out) == set(rows.REQUESTS)
    for kind in rows.REQUESTS:
        trained, held_out = expanded(wordings.trained[kind]), expanded(wordings.held_out[kind])
        assert len(trained) >= 30 and len(held_out) >= 20, kind
        assert not held_out & (trained | asked), kind


def test_typos_change_one_word_and_many_questions_have_none() -> None:
    rng = np.random.default_rng(0)
    sentence = "Which modality is this?"
    for _ in range(50):
        words = zip(sentence.split(), misspell(sentence, rng).split(), strict=True)
        assert sum(before != after for before, after in words) <= 1
    drawn = [restyle(sentence, rng) for _ in range(400)]
    assert 0.4 < drawn.count(sentence) / 400 < 0.7
    assert any("lease" in question for question in drawn) and sentence.lower().rstrip("?") in drawn


def test_each_kind_of_request_gets_the_right_reply() -> None:
    ill, well = make_case(modality="mr", finding="cyst", level="middle"), make_case(finding="none")
    replies = {kind: text.term_reply(kind, ill) for kind in rows.REQUESTS}
    assert replies["location"] == "Left mid zone" and replies["level"] == "Mid zone"
    assert replies["report"] == "Coronal chest MRI shows a thin-walled cyst in the left mid zone."
    assert replies["outside"].startswith("I can only answer questions about ")
    for kind in ("finding", "side", "level", "location"):
        assert text.term_reply(kind, well) == "No abnormality"


def test_no_text_mentions_a_size(folder: Path) -> None:
    for path in folder.glob("*_train.json"):
        answers = [
            t["value"] for row in json.loads(path.read_text()) for t in row["conversations"] if t["from"] == "gpt"
        ]
        assert not [a for a in answers if re.search(r"\b(mm|large|\d+)\b|small [^r]", a)]


def test_errors_name_the_argument_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_train is 0: it must be at least 1"):
        write_phantoms(tmp_path, num_train=0, num_held_out=1, seed=0, size=84)
    with pytest.raises(UserError, match=r"truth\.jsonl is missing.*babydoctor data phantom"):
        load_cases(tmp_path, "train")
