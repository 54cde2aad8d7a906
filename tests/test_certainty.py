"""Familiarity, confidence and agreement: the figures, what a run records, and what the APIs return."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from helpers.openai_client import client
from helpers.serving import (
    PROMPT,
    bare_base64,
    generation,
    llava_answer,
    llava_stream,
    png,
    tiny_run,
    tiny_worker,
    user_message,
)
from PIL import Image

from babydoctor.config import TaskConfig
from babydoctor.engine.request import TokenLogprob
from babydoctor.eval.certainty import confidence as measure
from babydoctor.eval.certainty import familiarity as measure_familiarity
from babydoctor.eval.certainty.agreement import measure_agreement
from babydoctor.eval.certainty.calibration import (
    TEMPERATURES,
    answer_log_probability,
    equal_count_bins,
    explain_confidence,
    fit_temperature,
    split_by_group,
)
from babydoctor.eval.certainty.familiarity import alarm_threshold, evaluate_familiarity
from babydoctor.eval.metrics import auroc
from babydoctor.imaging.load import load_image
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.familiarity import FILE_NAME, NEIGHBORS, Familiarity, describe_images
from babydoctor.model.run_dir import load_run, read_manifest, write_manifest
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.phantom.write import write_phantoms
from babydoctor.schema import UserError
from babydoctor.serve.page.certainty.texts import (
    agreement_sentence,
    confidence_sentence,
    lines_under_answer,
    percent,
    without_image_sentence,
)

__all__ = ["client"]
ONE = int(np.abs(np.log(TEMPERATURES)).argmin())
"""Index of temperature 1."""


def black_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (80, 60)).save(buffer, "PNG")
    return buffer.getvalue()


# Figures.


def test_a_distance_is_that_to_the_fifth_nearest_training_image() -> None:
    features = np.random.default_rng(0).normal(3, (1, 10, 0.1), (50, 3)).astype(np.float32)
    points = Familiarity.fit(features)
    scaled = (features - features.mean(0)) / features.std(0, ddof=1)
    new = np.array([[3, 3, 3], [30, 3, 3]], np.float32)
    expected = [
        np.sort(np.linalg.norm(scaled - (each - features.mean(0)) / features.std(0, ddof=1), axis=1))[NEIGHBORS - 1]
        for each in new
    ]
    np.testing.assert_allclose(points.distances(new), expected, rtol=2e-3)


def test_the_threshold_keeps_false_alarms_below_five_percent() -> None:
    random, rates = np.random.default_rng(0), []
    for _ in range(200):
        values = random.normal(size=240)
        rates.append(float(np.mean(values[120:] > alarm_threshold(values[:120]))))
    assert 0.04 < np.mean(rates) < 0.053
    assert alarm_threshold(np.array([3.0, 1.0, 2.0])) == 3.0


def test_auroc_counts_pairs() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1.0
    assert auroc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([2.5])) == pytest.approx(2 / 3)


def token_of(logits: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    log_p = logits - np.logaddexp.reduce(logits)
    order = np.argsort(-log_p)[:num_top]
    return TokenLogprob(token, str(token), float(log_p[token]), tuple((int(i), str(i), float(log_p[i])) for i in order))


def test_an_answers_probability_at_a_temperature_is_that_of_its_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (3, 8))
    tokens = [token_of(row, token, 8) for row, token in zip(logits, (2, 5, 7), strict=True)]
    for temperature in (0.3, 1.0, 4.0):
        scaled = logits / temperature
        expected = sum(row[t] - np.logaddexp.reduce(row) for row, t in zip(scaled, (2, 5, 7), strict=True))
        assert answer_log_probability(tokens, 8, [temperature])[0] == pytest.approx(expected, abs=1e-9)
    # If the tail is flat, only its size matters.
    tail = np.concatenate([[8.0, 5.0, 4.0], np.zeros(500)])
    scaled = tail / 0.4
    known = answer_log_probability([token_of(tail, 1, 3)], 503, [0.4])[0]
    assert known == pytest.approx(scaled[1] - np.logaddexp.reduce(scaled), abs=1e-9)


def test_the_temperature_of_an_overconfident_model_is_found() -> None:
    """Answers are drawn at temperature 1 from logits that the model states twice as large."""
    random = np.random.default_rng(0)
    scores, right = [], []
    for _ in range(2000):
        true = random.normal(0, 2, 4)
        chosen = int(true.argmax())
        right.append(float(random.random() < np.exp(true[chosen] - np.logaddexp.reduce(true))))
        scores.append(answer_log_probability([token_of(2 * true, chosen, 4)], 4, TEMPERATURES))
    best = fit_temperature(np.stack(scores), np.array(right))
    assert TEMPERATURES[best] == pytest.approx(2, rel=0.15)


def test_bins_cover_all_confidences_and_count_every_answer() -> None:
    random = np.random.default_rng(0)
    confidences, right = random.random(95).round(1), random.integers(0, 2, 95).astype(float)
    bins = equal_count_bins(confidences, right)
    assert bins[0]["low"] == 0 and bins[-1]["high"] == 1
    assert all(earlier["high"] == later["low"] for earlier, later in itertools.pairwise(bins))
    assert sum(each["count"] for each in bins) == 95 and sum(each["num_right"] for each in bins) == right.sum()
    for each in bins:
        inside = (confidences > (each["low"] or -1)) & (confidences <= each["high"])
        assert inside.sum() == each["count"]


def test_a_confidence_says_how_often_similar_answers_were_right_or_why_it_is_missing() -> None:
    bins = [
        {"low": 0.0, "high": 0.5, "count": 40, "num_right": 10},
        {"low": 0.5, "high": 1.0, "count": 41, "num_right": 40},
    ]
    figures = {"temperature": 1.0, "max_tokens": 2, "task": "phantom", "bins": bins}
    token = token_of(np.log([0.9, 0.1]), 0, 2)
    sure = explain_confidence(figures, [token], 2)
    assert sure["value"] == pytest.approx(0.9) and (sure["num_similar"], sure["num_similar_right"]) == (41, 40)
    assert explain_confidence(figures, [token_of(np.log([0.9, 0.1]), 1, 2)], 2)["num_similar_right"] == 10
    assert "3 tokens" in explain_confidence(figures, [token] * 3, 2)["unavailable"]


def test_no_image_is_in_both_halves() -> None:
    groups = [f"{number % 20}.png" for number in range(100)]
    first = split_by_group(groups, seed=0)
    assert first.sum() == 50
    assert not {g for g, f in zip(groups, first, strict=True) if f} & {
        g for g, f in zip(groups, first, strict=True) if not f
    }


def test_agreement_compares_normalized_texts() -> None:
    found = measure_agreement("A fracture.", ["fracture", "the Fracture!", "No abnormality", "a rib fracture"])
    assert (found["num_samples"], found["num_agreeing"]) == (4, 2)
    assert found["groups"][0] == {"text": "fracture", "count": 2} and len(found["groups"]) == 3
    assert found["word_overlap"] == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)


# Runs.


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, num_train=80, num_held_out=60, seed=0, size=84)
    return folder


def test_familiarity_is_measured_and_recorded(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a random tower: the run notices noise, text and photographs, and stores what it was measured with."""
    run_directory, photographs = tmp_path / "run", tmp_path / "photographs"
    shutil.copytree(tiny_run(), run_directory, ignore=shutil.ignore_patterns(FILE_NAME))
    photographs.mkdir()
    sky = np.zeros((70, 90, 3), np.uint8) + np.array([0, 90, 200], np.uint8)
    sky[..., 0] = np.linspace(0, 255, 90)
    Image.fromarray(sky).save(photographs / "sky.png")
    monkeypatch.setattr(measure_familiarity, "NUM_DRAWN", 40)
    rows = (str(phantoms / "radiology_train.json"),)
    task = TaskConfig(task="phantom", data=str(phantoms), train=rows)
    reported: list[tuple[str, int, int]] = []
    summary = evaluate_familiarity(
        run_directory, task, tmp_path / "out", unfamiliar=photographs, progress=lambda *each: reported.append(each)
    )
    assert summary["num_references"] == 80 and summary["num_held_out"] == 30
    assert ("training images", 80, 80) in reported and ("photographs", 12, 12) in reported
    assert set(summary["unfamiliar"]) == {"upside_down", "noise", "text", "photographs"}
    assert summary["false_alarms"] <= 0.2 and summary["auroc"] > 0.8
    assert all(summary["unfamiliar"][kind]["noticed"] > 0.9 for kind in ("noise", "text", "photographs"))
    assert read_manifest(run_directory).familiarity == summary
    run, points = load_run(run_directory), Familiarity.load(run_directory)
    assert points is not None and points.threshold == pytest.approx(summary["threshold"], rel=1e-6)
    stored = json.loads((tmp_path / "out/familiarity.json").read_text())["distances"]["held_out"]
    images = [load_image(phantoms / f"images/held_out_{number:05d}.png") for number in range(60)]
    pixels = np.stack([to_pixels(image, run.manifest.image) for image in images])
    again = points.distances(describe_images(run.model, pixels))
    assert np.abs(again[:, None] - np.array(stored)).min(axis=0).max() < 1e-2


def test_familiarity_names_what_is_missing(phantoms: Path, tmp_path: Path) -> None:
    task = TaskConfig(task="phantom", data=str(phantoms))
    with pytest.raises(UserError, match="--train"):
        evaluate_familiarity(tiny_run(), task, tmp_path)
    with pytest.raises(UserError, match="at least 40"):
        evaluate_familiarity(tiny_run(), task.model_copy(update={"max_questions": 8}), tmp_path)
    tensors = load_tensors(tiny_run() / FILE_NAME)
    save_tensors({name: value for name, value in tensors.items() if name != "scale"}, tmp_path / FILE_NAME)
    with pytest.raises(UserError, match=r"familiarity\.safetensors is damaged"):
        Familiarity.load(tmp_path)


def run_that_ends_its_answers(folder: Path, phantoms: Path) -> Path:
    """The tiny run, which never ends an answer. A token that it often generates becomes the end of text."""
    run_directory, base = folder / "run", folder / "base"
    shutil.copytree(tiny_run(), run_directory)
    shutil.copytree(tiny_run().parent / "base", base)
    run = load_run(run_directory)
    query = Query([user_turn("?", has_image=True)], max_new_tokens=4, logprobs=0)
    said: Counter[int] = Counter()
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query], batch_size=8) as inference:
        images = [load_image(phantoms / f"images/held_out_{number:05d}.png") for number in range(20)]
        queries = (replace(query, pixels=to_pixels(image, run.manifest.image)) for image in images)
        for answer in inference.answers(queries):
            said.update(token.token_id for token in answer.logprobs[1:])
    tensors = load_tensors(base / "model.safetensors")
    tensors["lm_head.weight"][2] = 1.01 * tensors["lm_head.weight"][said.most_common(1)[0][0]]
    save_tensors({name: tensor.clone() for name, tensor in tensors.items()}, base / "model.safetensors")
    write_manifest(run_directory, run.manifest.model_copy(update={"language_model": str(base)}))
    return run_directory


def test_a_runs_confidence_is_calibrated_and_recorded(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the run's own answers become the references, so the number of right answers is known."""
    monkeypatch.setattr(measure, "FEWEST_QUESTIONS", 20)
    run_directory = run_that_ends_its_answers(tmp_path, phantoms)
    rows = [
        {
            "id": str(number),
            "image": f"held_out_{number:05d}.png",
            "answer_type": "closed",
            "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "nothing of that"}],
        }
        for number in range(60)
    ]
    task = TaskConfig(task="rows", data=str(tmp_path / "rows.json"), images=str(phantoms / "images"))

    def evaluate() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        summary = measure.evaluate_confidence(run_directory, task, tmp_path / "out")
        return summary, json.loads((tmp_path / "out/confidence.json").read_text())["answers"]

    summary, answers = evaluate()
    assert summary["accuracy"] == 0 and summary["calibration_error_after"] < summary["calibration_error_before"]
    for number, answer in enumerate(answers):
        if number % 4:
            rows[int(answer["id"])]["conversations"][1]["value"] = answer["answer"]
    summary, again = evaluate()
    assert [answer["is_right"] for answer in again] == [bool(number % 4) for number in range(len(answers))]
    assert read_manifest(run_directory).confidence == summary
    assert summary["num_fitted"] + summary["num_measured"] == len(answers)
    assert sum(each["count"] for each in summary["bins"]) == summary["num_measured"]
    assert 1 <= summary["max_tokens"] <= measure.MAX_NEW_TOKENS
    rows = rows[:10]
    with pytest.raises(UserError, match="10 closed questions; --confidence needs at least 20"):
        evaluate()


# Sentences of the web UI.


@pytest.mark.parametrize(
    ("right", "count", "said"), [(37, 40, "right in 90 of 100 cases"), (40, 40, "98 of 100"), (5, 5, "too few answers")]
)
def test_the_text_about_confidence_states_what_was_measured(right: int, count: int, said: str) -> None:
    confidence = {"value": 0.876, "num_similar": count, "num_similar_right": right, "measured_on": "phantom"}
    ((kind, sentence),) = lines_under_answer({"confidence": confidence})
    assert kind == "note" and sentence.startswith("Confidence 88%. On held-out phantoms, ")
    assert said in sentence and sentence.endswith("; not measured on real images.")
    other = confidence_sentence(confidence | {"measured_on": "vqa-rad"})
    assert "On held-out questions (vqa-rad)" in other and other.endswith("; not measured on your images.")


def test_an_unfamiliar_image_gets_a_warning_and_no_confidence() -> None:
    confidence = {"value": 0.9, "num_similar": 40, "num_similar_right": 38, "measured_on": "phantom"}
    lines = lines_under_answer({"familiarity": {"is_familiar": False}, "confidence": confidence})
    assert [kind for kind, _ in lines] == ["warning", "note"] and not any("%" in sentence for _, sentence in lines)
    nothing = {"unavailable": "no file"}
    assert lines_under_answer({"familiarity": nothing, "confidence": nothing}) == lines_under_answer({}) == []
    assert len(lines_under_answer({"familiarity": {"is_familiar": True}, "confidence": confidence})) == 1


def test_a_confidence_never_claims_certainty() -> None:
    assert [percent(share) for share in (1.0, 0.996, 0.994, 0.5, 0.0)] == [
        *("over 99%", "over 99%", "99%", "50%", "under 1%")
    ]


def test_texts_about_agreement_do_not_claim_that_an_answer_is_right() -> None:
    agreed = agreement_sentence(measure_agreement("CT", ["ct", "CT."]))
    assert agreed.startswith("All 2 more answers") and "all be wrong" in agreed
    assert agreement_sentence(measure_agreement("CT", ["ct", "MRI"])).startswith("1 of 2 more answers")
    assert "Do not rely" in agreement_sentence(measure_agreement("CT", ["MRI", "X-ray"]))
    assert "same without the image" in without_image_sentence("CT.", "ct")
    assert "does not make it right" in without_image_sentence("CT", "MRI")


# APIs.


def last_message(**fields: Any) -> dict[str, Any]:
    *_, last = llava_stream(tiny_worker().url, generation(**{"image": png(3), "max_new_tokens": 6} | fields))
    return last


def test_the_llava_protocol_says_how_familiar_an_image_is() -> None:
    seen = last_message(familiarity=True)["familiarity"]
    assert seen["is_familiar"] and 0 < seen["distance"] <= seen["threshold"] and seen["measured_on"] == "phantom"
    other = last_message(image=black_png(), familiarity=True)["familiarity"]
    assert not other["is_familiar"] and other["distance"] > other["threshold"]
    assert last_message(image=None, familiarity=True)["familiarity"] == {"unavailable": "The request has no image."}
    assert "familiarity" not in last_message()
    points, run = Familiarity.load(tiny_run()), load_run(tiny_run())
    assert points is not None
    pixels = to_pixels(load_image(png(3)), run.manifest.image)[None]
    assert seen["distance"] == pytest.approx(float(points.distances(describe_images(run.model, pixels))[0]), rel=1e-4)


def test_the_llava_protocol_says_how_sure_a_short_answer_is() -> None:
    text = llava_answer(tiny_worker().url, generation(png(3), max_new_tokens=6))
    ended = {"stop": text[3], "confidence": True}
    messages = list(llava_stream(tiny_worker().url, generation(png(3), max_new_tokens=6, logprobs=1, **ended)))
    logprobs = [each for message in messages for each in message.get("logprobs", [])]
    assert all(each["top"] == [] for each in logprobs), "alternatives were not asked for"
    confidence = messages[-1]["confidence"]
    # The run's temperature is 1, so it is the product of the tokens' probabilities.
    assert confidence["value"] == pytest.approx(math.exp(sum(each["logprob"] for each in logprobs)), rel=1e-3)
    assert confidence["num_similar_right"] <= confidence["num_similar"] and confidence["measured_on"] == "phantom"
    assert "logprobs" not in last_message(**ended)
    assert "cut off" in last_message(confidence=True)["confidence"]["unavailable"]


def test_sampled_answers_are_compared() -> None:
    plain = llava_answer(tiny_worker().url, generation(png(3), max_new_tokens=6))
    last = last_message(agreement=3)
    found = last["agreement"]
    assert last["text"] == PROMPT + plain and last["finish_reason"] == "length"
    assert found["num_samples"] == 3 and sum(group["count"] for group in found["groups"]) == 3
    assert last_message(agreement=3)["agreement"] == found, "a repeated request draws the same samples"
    refused = requests.post(f"{tiny_worker().url}/worker_generate", json=generation(png(), agreement=99), timeout=60)
    assert refused.status_code == 422 and "agreement" in refused.text
    whole = requests.post(
        f"{tiny_worker().url}/worker_generate", json=generation(png(3), agreement=2), timeout=60
    ).json()
    assert whole["agreement"]["num_samples"] == 2 and whole["usage"]["completion_tokens"] == 32


def test_openais_apis_take_the_same_fields(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "temperature": 0}
    extra = {"familiarity": True, "confidence": True, "agreement": 2}
    messages: Any = [{"role": "system", "content": ""}, user_message("Which modality is this?", png(3))]
    choice = client.chat.completions.create(**options, messages=messages, max_tokens=6, extra_body=extra).choices[0]
    said = choice.model_extra or {}
    assert said["familiarity"]["is_familiar"] and said["agreement"]["num_samples"] == 2
    assert "cut off" in said["confidence"]["unavailable"]
    chunks = list(
        client.chat.completions.create(**options, messages=messages, max_tokens=6, stream=True, extra_body=extra)
    )
    assert {name: (chunks[-1].choices[0].model_extra or {})[name] for name in extra} == {
        name: said[name] for name in extra
    }
    content = [{"type": "input_text", "text": "Which modality is this?"}]
    url = f"data:image/png;base64,{bare_base64(png(3))}"
    asked: Any = [{"role": "user", "content": [*content, {"type": "input_image", "image_url": url}]}]
    response = client.responses.create(**options, input=asked, max_output_tokens=16, extra_body=extra)
    assert (response.model_extra or {})["familiarity"]["is_familiar"]
    with pytest.raises(openai.BadRequestError, match="agreement needs n = 1"):
        client.chat.completions.create(**options, messages=messages, n=2, extra_body={"agreement": 2})
    with pytest.raises(openai.BadRequestError, match="familiarity is not supported"):
        client.completions.create(**options, prompt="a", max_tokens=2, extra_body={"familiarity": True})


def test_the_openapi_document_describes_the_fields() -> None:
    schemas = requests.get(f"{tiny_worker().url}/openapi.json", timeout=60).json()["components"]["schemas"]
    for body in ("GenerateRequest", "ChatRequest", "ResponsesRequest"):
        for name in ("familiarity", "confidence", "agreement"):
            assert schemas[body]["properties"][name]["description"], (body, name)
