"""A whole evaluation: answers of a run are written as they arrive, scored, reported and compared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.eval_rows import write_rows
from helpers.serving import build_tiny_run

from babydoctor.cli.evaluation.tables import print_result
from babydoctor.config import TaskConfig
from babydoctor.engine.request import TokenLogprob
from babydoctor.eval.ask import (
    GenerationConfig,
    Prediction,
    answer_confidence,
    ask,
    build_inference,
    match_predictions,
    read_predictions,
)
from babydoctor.eval.compare import compare
from babydoctor.eval.conditions import ConditionedImages
from babydoctor.eval.load import load_task
from babydoctor.eval.reporting.model_card import SECTION, update_model_card
from babydoctor.eval.run import EvalConfig, evaluate, evaluate_task
from babydoctor.inference import Query
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.schema import UserError

SETTINGS = EvalConfig(
    images_as=("right", "shuffled"), generation=GenerationConfig(max_new_tokens=4, batch_size=4), num_resamples=100
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six yes/no and two open questions about four images."""
    answers = [*("yes", "no") * 3, "left lung", "left lung"]
    return write_rows(tmp_path_factory.mktemp("data"), answers)


def _write_answers(path: Path, answers: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"q{n}", "answer": a}) + "\n" for n, a in enumerate(answers)))
    return path


def test_a_run_is_scored_and_continues_where_it_stopped(run: Path, rows: Path, tmp_path: Path) -> None:
    config = TaskConfig(task="rows", data=str(rows))
    counted: list[tuple[str, int, int]] = []
    result = evaluate(tmp_path, config, SETTINGS, run=run, progress=lambda *progress: counted.append(progress))
    assert counted[-1] == ("shuffled image", 8, 8)
    assert set(result["conditions"]) == {"right", "shuffled"}
    assert result["conditions"]["right"]["figures"]["closed_accuracy"]["num_questions"] == 6
    assert result["baselines"]["always yes"]["yes_no_balanced_accuracy"] == 0.5
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["run"]["manifest"]["name"] == result["run"]["manifest"]["name"]
    # Cut the answers in the middle of a line, like a power failure: only lost answers are asked for again.
    file = tmp_path / "predictions-right.jsonl"
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:20])
    counted.clear()
    # A figure that was measured meanwhile does not make it another run.
    write_manifest(run, read_manifest(run).model_copy(update={"localization": {"num_near": 1, "num_cases": 2}}))
    evaluate(tmp_path, config, SETTINGS, run=run, progress=lambda *progress: counted.append(progress))
    assert counted == [("right image", number, 8) for number in (6, 7, 8)]
    assert file.read_text() == whole
    other = EvalConfig(generation=GenerationConfig(max_new_tokens=5))
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate(tmp_path, config, other, run=run)


def test_the_report_is_a_single_file(run: Path, rows: Path, tmp_path: Path) -> None:
    evaluate(tmp_path, TaskConfig(task="rows", data=str(rows)), SETTINGS, run=run)
    page = (tmp_path / "report.html").read_text()
    assert "Does it look?" in page
    assert "always yes" in page
    assert "data:image/jpeg;base64" in page
    assert 'src="http' not in page
    assert "href=" not in page.replace("xlink:href=", "")
    assert len(page) < 10_000_000


def test_a_task_runs_on_a_model_in_training(run: Path, rows: Path) -> None:
    loaded = load_run(run)
    loaded.model.train()
    settings = EvalConfig(images_as=("right",), generation=SETTINGS.generation, num_resamples=100)
    result = evaluate_task(
        loaded.model, loaded.tokenizer, loaded.manifest, load_task(TaskConfig(task="rows", data=str(rows))), settings
    )
    assert loaded.model.training
    assert result["conditions"]["right"]["figures"]["unparseable_rate"]["value"] <= 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_repeated_question_about_the_same_image_is_asked_once(
    temperature: float, run: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(run)
    task = load_task(TaskConfig(task="rows", data=str(rows)))
    questions = [replace(question, prompt="Where is it?", references=("lung",)) for question in task.questions]
    config = GenerationConfig(max_new_tokens=4, batch_size=2, temperature=temperature)
    known: dict[Hashable, Prediction] = {}
    asked: list[str] = []
    with build_inference(loaded.model, loaded.tokenizer, loaded.manifest, questions, config) as inference:

        def counted(queries: Iterable[Query]) -> Iterator[Query]:
            for query in queries:
                asked.append(query.id)
                yield query

        answers = inference.answers
        monkeypatch.setattr(inference, "answers", lambda queries: answers(counted(queries)))
        num_asked, texts = [], []
        for condition in ("right", "shuffled", "blank"):
            asked.clear()
            images = ConditionedImages(questions, condition, inference.image_settings)
            predictions = list(ask(inference, questions, images, config, known))
            assert [prediction.id for prediction in predictions] == [question.id for question in questions]
            num_asked.append(len(asked))
            texts.append({(images.name(q), p.answer) for q, p in zip(questions, predictions, strict=True)})
    if temperature:
        assert num_asked == [8, 8, 8]
    else:  # about four images, the same four, and the blank one
        assert num_asked == [4, 0, 1] and texts[0] == texts[1] and [len(pairs) for pairs in texts] == [4, 4, 1]


def test_answers_of_other_programs_are_scored(rows: Path, tmp_path: Path) -> None:
    answers = ["yes", "no", "yes", "no", "no", "yes", "left lung", "The right lung."]
    predictions = _write_answers(tmp_path / "answers.jsonl", answers)
    result = evaluate(tmp_path / "out", TaskConfig(task="rows", data=str(rows)), SETTINGS, predictions=predictions)
    figures = result["conditions"]["right"]["figures"]
    assert figures["closed_accuracy"]["value"] == pytest.approx(4 / 6)
    assert figures["open_token_f1"]["value"] == pytest.approx((1 + 1 / 2) / 2)
    assert result["gaps"] == {}


def test_questions_without_images_are_not_counted_as_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [("human", "Is it CT?"), ("gpt", "yes"), ("human", "Contrast?"), ("gpt", "no")]
    row = {"id": "q", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "rows.json").write_text(json.dumps([row, row | {"id": "r", "conversations": row["conversations"][:2]}]))
    predictions = tmp_path / "answers.jsonl"
    predictions.write_text("".join(json.dumps({"id": n, "answer": "yes"}) + "\n" for n in ("q-0", "q-1", "r")))
    config = TaskConfig(task="rows", data=str(tmp_path / "rows.json"), train=(str(tmp_path / "rows.json"),))
    result = evaluate(tmp_path / "out", config, SETTINGS, predictions=predictions)
    assert (result["num_questions"], result["num_images"], result["resampled"]) == (3, 0, "rows")
    closed = result["conditions"]["right"]["figures"]["closed_accuracy"]
    assert (closed["num_questions"], closed["num_clusters"]) == (3, 2)
    assert result["leakage"]["notes"] == ["3 of 3 questions are in train."]
    print_result(result)
    shown = capsys.readouterr().out
    assert "3 questions without images" in shown and "no image" in shown and "right image" not in shown
    report = (tmp_path / "out" / "report.html").read_text()
    assert "3 questions without images" in report and "resample rows" in report


def test_two_evaluations_are_compared(rows: Path, tmp_path: Path) -> None:
    config = TaskConfig(task="rows", data=str(rows))
    for name, answers in (("a", ["no"] * 8), ("b", ["yes", "no", "yes", "no", "yes", "no", "left lung", "left lung"])):
        predictions = _write_answers(tmp_path / f"{name}.jsonl", answers)
        evaluate(tmp_path / name, config, SETTINGS, predictions=predictions)
    compared = compare(tmp_path / "a", tmp_path / "b")
    assert (compared["num_questions"], compared["num_same_answers"]) == (8, 3)
    found = compared["figures"]["closed_accuracy"]
    assert (found["a"], found["b"], found["value"]) == (0.5, 1.0, 0.5)
    assert 0 < found["p_value"] <= 1
    evaluate(
        tmp_path / "c",
        TaskConfig(task="rows", data=str(rows), prompt="{question} Say it."),
        SETTINGS,
        predictions=tmp_path / "a.jsonl",
    )
    with pytest.raises(UserError, match="different questions"):
        compare(tmp_path / "a", tmp_path / "c")


def test_rows_of_the_model_card_are_replaced_and_others_kept(rows: Path, tmp_path: Path) -> None:
    predictions = _write_answers(tmp_path / "mine.jsonl", ["yes"] * 8)
    result = evaluate(tmp_path / "out", TaskConfig(task="rows", data=str(rows)), SETTINGS, predictions=predictions)
    card = tmp_path / "MODEL_CARD.md"
    card.write_text("before\n")
    with pytest.raises(UserError, match="markers"):
        update_model_card(card, result)
    begin, end = (f"<!-- {SECTION}: {word} -->" for word in ("begin", "end"))
    card.write_text(f"before\n{begin}\n| slake | other | x | 1 | 2 | 3 | 4 |\n{end}\nafter\n")
    update_model_card(card, result)
    once = card.read_text()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "| slake | other |" in once
    assert "| rows | mine.jsonl | closed accuracy | 0.500" in once
    update_model_card(card, result)
    assert card.read_text() == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "q0"}\n', "needs id and answer"),
        ("nonsense\n", r"answers\.jsonl:1"),
        ('{"id": "z", "answer": "no"}\n', "have no prediction"),
    ],
)
def test_bad_prediction_files_are_named(tmp_path: Path, rows: Path, text: str, message: str) -> None:
    from babydoctor.eval.load import load_task

    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    questions = load_task(TaskConfig(task="rows", data=str(rows))).questions
    with pytest.raises(UserError, match=message):
        match_predictions(path, questions)


def test_predictions_with_llavas_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"question_id": 7, "text": "no"}]))
    assert [(p.id, p.answer) for p in read_predictions(path)] == [("7", "no")]


def test_confidence_is_computed_from_logprobs() -> None:
    def token(text: str, probability: float, *top: tuple[str, float]) -> TokenLogprob:
        return TokenLogprob(0, text, math.log(probability), tuple((0, t, math.log(p)) for t, p in top))

    whole = [token("Yes", 0.6, ("Yes", 0.6), ("No", 0.2))]
    assert answer_confidence("Yes", whole) == pytest.approx(0.75)
    # The tokenizer splits one of the words, so its first piece is compared with the other word.
    split = [token("Y", 0.6, ("Y", 0.6), ("No", 0.2)), token("es", 0.9, ("es", 0.9))]
    assert answer_confidence("Yes", split) == pytest.approx(0.75)
    # The first token begins neither word, so the probability of all tokens counts.
    assert answer_confidence("Yes", [token("(", 0.8, ("(", 0.8)), token("Yes", 0.5)]) == pytest.approx(0.4)
    assert answer_confidence("left", whole) is None


def test_the_word_run_may_be_left_out(rows: Path, tmp_path: Path) -> None:
    predictions = _write_answers(tmp_path / "a.jsonl", ["no"] * 8)
    words: list[Any] = ["eval", "--task", "rows", "--data", rows, "--predictions", predictions, "--out", tmp_path / "o"]
    code = "from babydoctor.cli.main import main; main()"
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "majority per question type" in done.stdout
    done = subprocess.run(
        [sys.executable, "-c", code, "eval", "compare", str(tmp_path / "o"), str(tmp_path / "o")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "closed accuracy" in done.stdout, done.stderr
