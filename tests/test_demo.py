"""The demo: its score cannot be gamed, its steps go on where they were, its stages are the real configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from babydoctor.config import load_config
from babydoctor.demo import demo
from babydoctor.demo.demo_score import (
    Answerer,
    Question,
    accuracies,
    chance,
    load_questions,
    score,
    shortfalls,
    shuffled_images,
)
from babydoctor.demo.tiny_language import LanguageSettings, TinySettings, make_tiny_base
from babydoctor.demo.tiny_tower import TowerSettings
from babydoctor.phantom.text import KINDS, question_rows
from babydoctor.phantom.write import build_cases, write_phantoms
from babydoctor.schema import UserError


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [Question(**row) for case in build_cases("held_out", 480, 7) for row in question_rows(case)]


def test_chance_is_the_best_constant_answer(questions: list[Question]) -> None:
    assert chance(questions) == {"modality": 0.25, "finding": 0.2, "side": 0.5, "level": pytest.approx(1 / 3)}


def test_shuffling_gives_each_case_another_image_whose_truth_agrees_as_often_as_chance(
    questions: list[Question],
) -> None:
    other = shuffled_images(questions)
    assert sorted(other) == sorted(other.values())
    assert all(image != wrong for image, wrong in other.items())
    assert other == shuffled_images(questions)
    for kind, expected in chance(questions).items():
        truth = {q.image: q.truth for q in questions if q.kind == kind}
        pairs = [(truth[image], truth[other[image]]) for image in truth if other[image] in truth]
        assert abs(sum(a == b for a, b in pairs) / len(pairs) - expected) < 0.02, kind


def made_up(right: float, shuffled: dict[str, float], terms: float) -> dict[str, Any]:
    def counts(share: float, in_terms: float) -> dict[str, int]:
        return {
            "total": 1000,
            "correct": round(1000 * share),
            "exact": round(1000 * share),
            "terms": round(1000 * in_terms),
        }

    return {
        "scores": {
            "right image": {kind: counts(right, terms) for kind in KINDS},
            "shuffled image": {kind: counts(shuffled[kind], terms) for kind in KINDS},
        }
    }


def test_a_score_falls_short_for_each_of_its_reasons(questions: list[Question]) -> None:
    by_chance = chance(questions)
    lay = made_up(0.8, by_chance, terms=0.0)
    assert shortfalls(made_up(0.9, by_chance, terms=1.0), lay, by_chance) == []
    (weak,) = shortfalls(made_up(0.8, by_chance, terms=1.0), lay, by_chance)
    assert weak == "mean accuracy is 80.0%, below 85%"
    assert len(shortfalls(made_up(0.7, by_chance, terms=1.0), lay, by_chance)) == 1 + len(KINDS)
    (leak,) = shortfalls(made_up(0.9, by_chance | {"side": 0.6}, terms=1.0), lay, by_chance)
    assert leak.startswith("side: 60.0% with shuffled images")
    (words,) = shortfalls(made_up(0.9, by_chance, terms=0.5), lay, by_chance)
    assert words.startswith("radiology terms: 50.0%")


def test_finished_steps_are_skipped_and_the_rest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def step(name: str) -> demo.Step:
        def run() -> None:
            ran.append(name)
            (tmp_path / name).write_text("")

        return demo.Step(name, tmp_path / name, run)

    (tmp_path / "first").write_text("")
    monkeypatch.setattr(demo, "build_steps", lambda work: [step("first"), step("second"), step("third")])
    monkeypatch.setattr(demo, "print_scores", lambda work: ["mean accuracy is low"])
    monkeypatch.setattr(demo, "try_out", lambda work, ask_once: ran.append(f"chat, once: {ask_once}"))
    assert demo.run_demo(tmp_path, check=True) == 1
    assert ran == ["second", "third", "chat, once: True"]
    assert demo.run_demo(tmp_path, check=False) == 0
    assert ran[3:] == ["chat, once: False"]


def test_the_tiny_configurations_are_the_three_stages(tmp_path: Path) -> None:
    align, instruct, radiology = (
        load_config(demo.CONFIGS / f"{stage}.yaml", demo.stage_overrides(tmp_path, stage)) for stage in demo.STAGES
    )
    assert align.lora is None and align.data.template == "plain"
    assert instruct.lora is not None and instruct.model.quantization == "none"
    assert radiology.lora is not None and radiology.model.quantization == "nf4" and radiology.model.double_quantization
    assert (instruct.init_from, radiology.init_from) == (align.output_dir, instruct.output_dir)
    for config in (align, instruct, radiology):
        assert "train" in config.data.rows[0] and "held_out" in config.data.eval_rows[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A demo in miniature, up to two steps of stage 1."""
    folder = tmp_path_factory.mktemp("demo")
    write_phantoms(folder / "phantoms", num_train=24, num_held_out=12, seed=0, size=84)
    language = LanguageSettings(
        hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_texts=64, num_steps=2
    )
    tower = TowerSettings(hidden_size=32, num_layers=2, num_heads=2, num_steps=2, batch_size=8)
    make_tiny_base(folder / "phantoms", folder / "base", TinySettings(language=language, tower=tower))
    from babydoctor.train.loop import train

    overrides = ["train.max_steps=2", "train.batch_size=4", "data.eval_limit=2", "train.num_sample_answers=0"]
    train(load_config(demo.CONFIGS / "align.yaml", [*demo.stage_overrides(folder, "align"), *overrides]))
    yield folder


def test_every_question_is_asked_under_each_condition(work: Path) -> None:
    from babydoctor.model.run_dir import load_run

    result = score(load_run(work / "align"), work / "phantoms")
    questions = load_questions(work / "phantoms")
    assert set(result["answers"]) == {q.id for q in questions}
    for counts in result["scores"].values():
        assert {kind: counts[kind]["total"] for kind in KINDS} == {
            kind: sum(q.kind == kind for q in questions) for kind in KINDS
        }
        assert 0 <= accuracies(counts)["mean"] <= 1


def test_the_same_question_about_the_same_image_is_generated_once(work: Path) -> None:
    from babydoctor.model.run_dir import load_run

    answerer = Answerer(load_run(work / "align"), work / "phantoms" / "images")
    generated: list[int] = []
    generate = answerer._generate

    def counting(requests: Any, max_new_tokens: int) -> list[str]:
        generated.append(len(requests))
        return generate(requests, max_new_tokens)

    answerer._generate = counting  # type: ignore[method-assign]
    request = ("<image>\nWhat is the main finding?", "held_out_00000.png")
    blind = ("What is the main finding?", None)
    first = answerer.ask([request, blind, request], max_new_tokens=2)
    assert first[0] == first[2] and sum(generated) == 2
    answerer.ask([blind, request], max_new_tokens=2)
    assert sum(generated) == 2


def test_a_missing_phantom_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="babydoctor data phantom"):
        load_questions(tmp_path)


def test_answers_that_look_like_markup_are_printed_as_they_are(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "phantoms").symlink_to(work / "phantoms")
    (tmp_path / "scores").mkdir()
    for stage in demo.STAGES:
        result = made_up(0.9, dict.fromkeys(KINDS, 0.5), terms=1.0)
        result["scores"]["no image"] = result["scores"]["shuffled image"]
        result["answers"] = {question.id: "[/INST] [bold]a mass" for question in load_questions(work / "phantoms")}
        (tmp_path / "scores" / f"{stage}.json").write_text(json.dumps(result))
    demo.print_scores(tmp_path)
    assert capsys.readouterr().out.count("[/INST] [bold]a mass") == len(demo.STAGES)
