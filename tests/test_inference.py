"""Inference in this process: batches, refusals, conversations, and a model in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from babydoctor.config import build_config
from babydoctor.inference import Inference, Query, open_conversation, user_turn
from babydoctor.model.run_dir import Run, load_run
from babydoctor.schema import Turn


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return load_run(tiny_run)


@pytest.fixture(scope="module")
def pixels(run: Run) -> np.ndarray:
    size = run.manifest.image_size
    return np.random.default_rng(0).standard_normal((3, size, size), np.float32)


def greedy_by_transformers(run: Run, query: Query) -> str:
    """The same answer from ``transformers.generate``."""
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query]) as inference:
        prompt, stop = inference.encode(query.turns, query.system), inference.template.stop
    ids, mask = torch.from_numpy(prompt.input_ids)[None].long(), torch.from_numpy(prompt.image_mask)[None]
    with torch.no_grad():
        features = None if query.pixels is None else run.model.encode_images(torch.from_numpy(query.pixels)[None])
        embeds = run.model.embed(ids, mask, features)
        language_model: Any = run.model.language_model
        output = language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=query.max_new_tokens,
            do_sample=False,
            pad_token_id=run.tokenizer.eos_token_id,
        )
    (text,) = run.tokenizer.batch_decode(output, skip_special_tokens=True)
    return text.split(stop)[0].strip()


def test_answers_are_in_order_and_equal_those_of_transformers(run: Run, pixels: np.ndarray) -> None:
    queries = [
        Query([user_turn("Which side?", has_image=True)], pixels, max_new_tokens=6),
        Query([Turn("user", "Say left.")], max_new_tokens=9),
        Query([Turn("user", "Say left.")], system="Answer in one word.", max_new_tokens=6),
    ]
    queries += [Query([Turn("user", "Why? " * number)], max_new_tokens=3) for number in range(1, 6)]
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, queries, batch_size=2) as inference:
        answers = list(inference.answers(queries))
    assert [answer.text for answer in answers] == [greedy_by_transformers(run, query) for query in queries]
    assert all(answer.finish_reason in ("stop", "length") and answer.num_tokens > 0 for answer in answers)


def test_a_refused_query_is_an_error_and_the_others_are_answered(run: Run, pixels: np.ndarray) -> None:
    good = Query([Turn("user", "Why?")], max_new_tokens=3)
    too_long = Query([Turn("user", "Why? " * 200)], max_new_tokens=3)
    no_slot = Query([Turn("user", "Why?")], pixels, max_new_tokens=3)
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, [good]) as inference:
        answers = list(inference.answers([too_long, good, no_slot]))
    assert [answer.finish_reason.startswith("error: ") for answer in answers] == [True, False, True]
    assert answers[0].text == "" and answers[1].num_tokens > 0


def test_the_training_mode_is_restored(run: Run) -> None:
    run.model.train()
    try:
        query = Query([Turn("user", "Why?")], max_new_tokens=2)
        with Inference.for_queries(run.model, run.tokenizer, run.manifest, [query]) as inference:
            assert not run.model.training
            inference.answer(query)
        assert run.model.training
    finally:
        run.model.eval()


def test_a_conversation_sends_the_image_once_and_remembers_its_turns(run: Run, pixels: np.ndarray) -> None:
    conversation = open_conversation(run, pixels, max_new_tokens=4, engine={"max_context": 512})
    with conversation.inference as inference:
        first = "".join(conversation.ask("Which side?")).strip()
        second = "".join(conversation.ask("And why?")).strip()
        turns = [user_turn("Which side?", has_image=True), Turn("assistant", first), Turn("user", "And why?")]
        assert conversation.turns == [*turns, Turn("assistant", second)]
        assert inference.answer(Query(turns, pixels, max_new_tokens=4)).text == second
        # A reader that stops early frees the engine. The conversation does not change.
        next(iter(conversation.ask("And then?")), None)
        assert len(conversation.turns) == 4
        assert "".join(inference.stream(Query(turns, pixels, max_new_tokens=4))).strip() == second


def test_sample_answers_during_training_come_from_the_current_weights(
    tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    from babydoctor.train.loop import train
    from babydoctor.train.tracking import read_metrics

    settings = tiny_settings | {"output_dir": str(tmp_path / "run"), "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
    settings["train"] = settings["train"] | {"max_steps": 3, "num_sample_answers": 2}
    settings["data"] = settings["data"] | {"eval_rows": settings["data"]["rows"]}
    path = train(build_config(settings))
    (record,) = (record for record in read_metrics(path) if record["kind"] == "eval")
    finished, samples = load_run(path), record["answers"]
    assert [sample["id"] for sample in samples] == ["0", "1"]
    from babydoctor.data.images import read_image
    from babydoctor.data.rows import load_dataset_rows
    from babydoctor.imaging.preprocess import to_pixels

    rows = load_dataset_rows(settings["data"]["rows"], settings["data"]["images"], "refuse")
    for sample, row in zip(samples, rows, strict=False):
        assert row.image is not None
        image = to_pixels(read_image(row.image, settings["data"]["images"]), finished.manifest.image)
        query = Query(row.turns[:1], image, max_new_tokens=48)
        with Inference.for_queries(finished.model, finished.tokenizer, finished.manifest, [query]) as inference:
            assert sample["answer"] == inference.answer(query).text
