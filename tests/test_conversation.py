"""Templates and tokens equal the original code's for all golden rows, and ids and labels are exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from babydoctor.conversation import TEMPLATES, get_template, move_image_first, prompt_text, render, render_prompt
from babydoctor.data.rows import parse_row
from babydoctor.data.tokens import CUE_TOKENS, MIN_SUPERVISED, encode, load_tokenizer
from babydoctor.schema import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Turn, UserError

ASK = Turn("user", "<image>\nWhich side?")
ANSWER = Turn("assistant", "left")


def test_golden_rows_equal_the_original_code(golden: Path) -> None:
    tokenizer = load_tokenizer(golden / "base")
    lines = (golden / "expected" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 96
    for number, line in enumerate(lines):
        expected = json.loads(line)
        image = {"image": "x.jpg"} if any("<image>" in turn["value"] for turn in expected["turns"]) else {}
        sample = parse_row({"id": "1", "conversations": expected["turns"], **image}, f"row {number}")
        segments = render(sample.turns, get_template(expected["template"]))
        example = encode(segments, tokenizer, num_patches=1)
        ids = np.where(example.image_mask, IMAGE_TOKEN_INDEX, example.input_ids)
        assert prompt_text(segments) == expected["prompt"], number
        assert ids.tolist() == expected["input_ids"], number
        if "reference_note" not in expected:
            assert example.labels.tolist() == expected["labels"], number
        else:  # the original masked the whole row, but every reply must be supervised
            learnt = tokenizer.decode(example.labels[example.labels != IGNORE_INDEX])
            for turn in sample.turns[1::2]:
                assert " ".join(turn.text.split()) in " ".join(learnt.split()), number


def test_golden_prompts_equal_the_original_code(golden: Path) -> None:
    tokenizer = load_tokenizer(golden / "base")
    for expected in json.loads((golden / "expected" / "inference_prompts.json").read_text()):
        template = get_template(expected["template"])
        question = "<image>\nThe following image is a radiology scan. Deeply analyze and diagnose this image."
        segments = render_prompt([Turn("user", question)], template)
        example = encode(segments, tokenizer, num_patches=1)
        assert prompt_text(segments) == expected["prompt"]
        assert np.where(example.image_mask, IMAGE_TOKEN_INDEX, example.input_ids).tolist() == expected["input_ids"]
        assert template.stop == expected["stop"]
        assert (example.labels == IGNORE_INDEX).all()


@pytest.mark.parametrize(
    ("template", "learnt"),
    [("plain", "left\n"), ("llava_llama_2", " left </s>"), ("llama_2", " left </s>"), ("v1", " left</s>")],
)
def test_supervised_text(template: str, learnt: str) -> None:
    segments = render([ASK, ANSWER], get_template(template))
    assert "".join(s.text for s in segments if s.supervised) == learnt
    assert [s.text for s in segments if s.is_image] == ["<image>"]


def test_the_plain_template_keeps_the_image_and_drops_the_question() -> None:
    assert prompt_text(render([ASK, ANSWER], get_template("plain"))) == "<image>left\n"


def test_system_prompt_can_be_replaced_and_left_out() -> None:
    template = get_template("llava_llama_2")
    assert prompt_text(render_prompt([Turn("user", "Hi")], template, system="")) == "[INST] Hi [/INST]"
    assert "<<SYS>>\nBe brief.\n<</SYS>>" in prompt_text(render_prompt([ASK], template, system="Be brief."))


def test_answers_with_braces_are_unchanged() -> None:
    segments = render([ASK, Turn("assistant", "{answer} {x}")], get_template("v1"))
    assert "".join(s.text for s in segments if s.supervised) == " {answer} {x}</s>"


@pytest.mark.parametrize("turns", [[], [ASK], [ANSWER], [ASK, ASK, ANSWER], [ANSWER, ASK], [ASK, ANSWER, ASK]])
def test_turns_in_the_wrong_order_are_refused(turns: list[Turn]) -> None:
    with pytest.raises(UserError, match="alternates"):
        render(turns, get_template("v1"))


@pytest.mark.parametrize("template", ["llava_llama_2", "v1"])
@pytest.mark.parametrize("system", [None, ""])
def test_a_rendered_prompt_gets_its_image_first_as_in_training(template: str, system: str | None) -> None:
    def prompt(question: str) -> str:
        turns = [Turn("user", question), Turn("assistant", "Left"), Turn("user", "Where?")]
        return prompt_text(render_prompt(turns, get_template(template), system=system))

    first = prompt("<image>\nWhich side?")
    assert move_image_first(prompt("Which side?\n<image>"), get_template(template)) == first
    assert move_image_first(prompt("Which <image> side?"), get_template(template)) == prompt("<image>\nWhich  side?")
    unchanged = (first, prompt("<image>Which side?"), prompt("<image>\nWhich <image>?"), prompt("Hi"), "Hi <image>")
    assert all(move_image_first(text, get_template(template)) == text for text in unchanged)


def test_the_error_for_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="llava_llama_2"):
        get_template("vicuna")


def test_ids_and_labels_are_exact(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base / "llama")
    example = encode(render([ASK, ANSWER], get_template("v1"), system=""), tokenizer, num_patches=3)
    before = tokenizer("USER: ", add_special_tokens=False)["input_ids"]
    between = tokenizer("\nWhich side? ASSISTANT:", add_special_tokens=False)["input_ids"]
    answer = tokenizer(" left", add_special_tokens=False)["input_ids"]
    assert example.input_ids.tolist() == [1, *before, 0, 0, 0, *between, *answer, 2]
    assert example.labels.tolist() == [-100] * (4 + len(before) + len(between)) + [*answer, 2]
    assert example.image_mask.tolist() == [False] * (1 + len(before)) + [True] * 3 + [False] * (
        len(between) + len(answer) + 1
    )
    assert example.num_supervised == len(answer) + 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncation_keeps_the_image_and_one_reply(tiny_base: Path, data: st.DataObject) -> None:
    tokenizer = load_tokenizer(tiny_base / "llama")
    words = st.text("abc d", min_size=1, max_size=60)
    turns = [Turn("user", "<image>\n" + data.draw(words)), Turn("assistant", "x" + data.draw(words))]
    for _ in range(data.draw(st.integers(0, 2))):
        turns += [Turn("user", data.draw(words)), Turn("assistant", data.draw(words))]
    segments = render(turns, get_template(data.draw(st.sampled_from(["llava_llama_2", "v1"]))), system="s")
    whole = encode(segments, tokenizer, num_patches=4)
    limit = data.draw(st.integers(1 + 4 + CUE_TOKENS + MIN_SUPERVISED + 4, len(whole) + 5))
    example = encode(segments, tokenizer, num_patches=4, max_length=limit)
    assert len(example) == min(limit, len(whole))
    assert example.num_cut == len(whole) - len(example)
    assert example.image_mask.sum() == 4
    assert example.num_supervised > 0


def test_images_that_do_not_fit_are_refused(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base / "llama")
    with pytest.raises(UserError, match=r"data\.max_length"):
        encode(render([ASK, ANSWER], TEMPLATES["v1"]), tokenizer, num_patches=50, max_length=40, id="7")
