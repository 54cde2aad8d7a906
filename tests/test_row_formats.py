"""Rows of other trainers: supported content is read. Content that would be dropped makes the row bad, and is named."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.image_files import plain_png

from babydoctor.conversation import get_template, prompt_text, render
from babydoctor.data.images import read_image
from babydoctor.data.problems import RowError
from babydoctor.data.rows import check_rows, fingerprint, load_dataset_rows, parse_row
from babydoctor.data.sources import iter_rows
from babydoctor.schema import Sample, Turn, UserError

HUMAN, GPT = {"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "x"}
USER, ASSISTANT = {"role": "user", "content": "<image>\nwhat"}, {"role": "assistant", "content": "x"}
TURNS = (Turn("user", "<image>\nwhat"), Turn("assistant", "x"))
TEXT = {"type": "text", "text": "what"}


DATA_URL = "data:image/png;base64," + base64.b64encode(plain_png(7)).decode()

PLAIN: dict[str, dict[str, Any]] = {
    "llava": {"image": "a.png", "conversations": [HUMAN, GPT]},
    "images": {"images": ["a.png"], "conversations": [HUMAN, GPT]},
    "images as text": {"images": "a.png", "conversations": [HUMAN, GPT]},
    "image and the same in images": {"image": "a.png", "images": ["a.png"], "conversations": [HUMAN, GPT]},
    "images as datasets stores them": {"images": [{"bytes": None, "path": "a.png"}], "conversations": [HUMAN, GPT]},
    "openai": {"images": ["a.png"], "messages": [USER, ASSISTANT]},
    "openai turns under conversations": {"image": "a.png", "conversations": [USER, ASSISTANT]},
    "sharegpt turns under messages": {"image": "a.png", "messages": [HUMAN, GPT]},
    "parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, TEXT]},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ],
    },
    "parts with the image": {
        "messages": [{"role": "user", "content": [TEXT, {"type": "image", "image": "a.png"}]}, ASSISTANT]
    },
    "parts with an address": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]},
            ASSISTANT,
        ]
    },
    "empty keys say nothing": {
        "image": "a.png",
        "images": [],
        "messages": None,
        "system": "",
        "videos": [],
        "tools": None,
        "conversations": [HUMAN | {"weight": None}, GPT],
    },
    "metadata": {
        "image": "a.png",
        "conversations": [HUMAN, GPT],
        "metadata": {"anything": 1},
        "_index": 3,
        "question_type": "PRES",
    },
}


@pytest.mark.parametrize("layout", PLAIN)
def test_supported_layouts_become_the_same_sample(layout: str) -> None:
    sample = parse_row({"id": "1", **PLAIN[layout]}, "f.json#0")
    assert sample == Sample("1", TURNS, "a.png", "f.json#0")


def test_a_system_prompt_reaches_the_model() -> None:
    system = "You are a radiologist"
    rows: list[dict[str, Any]] = [
        {"id": 7, "image": "a.png", "system": system, "conversations": [HUMAN, GPT]},
        {"id": 7, "image": "a.png", "conversations": [{"from": "system", "value": system}, HUMAN, GPT]},
        {"id": 7, "image": "a.png", "messages": [{"role": "system", "content": system}, USER, ASSISTANT]},
        {"id": 7, "image": "a.png", "messages": [{"role": "developer", "content": system}, USER, ASSISTANT]},
    ]
    samples = [parse_row(row, "r") for row in rows]
    assert all(sample == samples[0] for sample in samples)
    text = prompt_text(render(samples[0].turns, get_template("llava_llama_2"), system=samples[0].system))
    assert text == "[INST] <<SYS>>\nYou are a radiologist\n<</SYS>>\n\n<image>\nwhat [/INST] x </s>"
    with pytest.raises(UserError, match=r"'plain' has no system prompt.*You are a radiologist"):
        render(samples[0].turns, get_template("plain"), system=samples[0].system)
    without = parse_row({"id": 7, "image": "a.png", "conversations": [HUMAN, GPT]}, "r")
    assert fingerprint([samples[0]]) != fingerprint([without])


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("unknown_key", "video", {"video": "a.mp4", "conversations": [HUMAN, GPT]}),
    ("unknown_key", "videos", {"videos": ["a.mp4"], "messages": [USER, ASSISTANT]}),
    ("unknown_key", "audios", {"audios": ["a.wav"], "conversations": [HUMAN, GPT]}),
    ("unknown_key", "tools", {"tools": "[{}]", "conversations": [HUMAN, GPT]}),
    ("unknown_key", "history", {"history": [["a", "b"]], "image": "a.png", "conversations": [HUMAN, GPT]}),
    ("unknown_key", "chosen", {"chosen": GPT, "rejected": GPT, "conversations": [HUMAN, GPT]}),
    ("unknown_key", "conversations[1].weight", {"image": "a.png", "conversations": [HUMAN, GPT | {"weight": 0}]}),
    ("unknown_key", "messages[1].tool_calls", {"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]}),
    ("unknown_key", "both 'conversations' and 'messages'", {"messages": [USER], "conversations": [HUMAN]}),
    ("several_images", "2 images", {"images": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}),
    ("several_images", "image and images", {"image": "a.png", "images": ["b.png"], "conversations": [HUMAN, GPT]}),
    ("image_token_missing", "What?", {"images": ["a.png"], "conversations": [HUMAN | {"value": "What?"}, GPT]}),
    ("image_path", "images: a int", {"images": [3], "conversations": [HUMAN, GPT]}),
    ("image_path", "data URL", {"images": ["data:image/png;base64,????"], "conversations": [HUMAN, GPT]}),
    ("bad_turn", "input_audio", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ASSISTANT]}),
    ("bad_turn", "'tool'", {"messages": [USER, {"role": "tool", "content": "x"}]}),
    ("bad_turn", "'observation'", {"conversations": [HUMAN, {"from": "observation", "value": "x"}]}),
    ("bad_turn", "content", {"messages": [USER, {"role": "assistant", "content": None}]}),
    ("not_a_row", "instruction, output", {"instruction": "a", "output": "b"}),
    ("turn_order", "no turn", {"conversations": [{"from": "system", "value": "s"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "named", "row"), BAD)
def test_content_that_would_be_dropped_makes_the_row_bad(reason: str, named: str, row: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"id": "1", **row}, "rows.json#4")
    assert caught.value.problem.reason == reason
    assert named in str(caught.value) and "rows.json#4" in str(caught.value) and caught.value.problem.id == "1"


def test_images_in_data_urls_are_read() -> None:
    content = [{"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}, TEXT]
    sample = parse_row({"messages": [{"role": "user", "content": content}, ASSISTANT]}, "r")
    assert sample.image == plain_png(7) and read_image(sample.image, None).getpixel((0, 0)) == (7, 0, 0)


def test_a_repeated_key_is_named(tmp_path: Path) -> None:
    turns = json.dumps([HUMAN, GPT])
    text = f'{{"id": "1", "image": "a.png", "image": "b.png", "conversations": {turns}}}'
    nested = '{"conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "gpt", "value": "x"}]}'
    for name, content in (("rows.json", f"[{text}, {nested}]"), ("rows.jsonl", f"{text}\n{nested}\n")):
        (tmp_path / name).write_text(content)
        found = list(check_rows(iter_rows(tmp_path / name), tmp_path))
        assert [(problem.reason, problem.detail) for problem in found] == [
            ("repeated_key", "image"),
            ("repeated_key", "conversations[0].value"),
        ]


def test_files_with_more_than_one_json_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[{"id": 1}], [], [{"id": 2}, {"id": 3}]]
    path = tmp_path / "rows.json"
    for joint in ("", "\n", " \n\n "):
        path.write_text(joint.join(json.dumps(rows) for rows in lists) + joint)
        for chunk in (7, 1 << 20):
            monkeypatch.setattr("babydoctor.data.json_rows._CHUNK_CHARS", chunk)
            assert [row for _, row in iter_rows(path)] == [{"id": 1}, {"id": 2}, {"id": 3}]
            assert [where for where, _ in iter_rows(path)] == [f"{path}#{index}" for index in range(3)]
    for rest in ('{"id": 2}', "]", "3", ', {"id": 2}'):
        path.write_text('[{"id": 1}]\n' + rest)
        with pytest.raises(UserError, match="after the list of 1 rows comes"):
            list(iter_rows(path))
    path.write_text('[{"id": 1}]\n[{"id": 2}')
    with pytest.raises(UserError, match="cut off"):
        list(iter_rows(path))
    path.write_text('{"id": 1} {"id": 2}\n{"id": 3}')
    assert [type(row).__name__ for _, row in iter_rows(path)] == ["UnreadableRow", "dict"]


def test_data_sets_with_messages_and_a_list_of_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    content = {
        "messages": [[USER, ASSISTANT], [{"role": "user", "content": "q"}, ASSISTANT]],
        "images": [[{"bytes": plain_png(9), "path": None}], []],
    }
    data = datasets.Dataset.from_dict(content).cast_column("images", datasets.List(datasets.Image()))
    data.save_to_disk(tmp_path / "saved")
    first, second = load_dataset_rows(str(tmp_path / "saved"), None)
    assert first.turns == TURNS and first.image == f"embedded://{tmp_path / 'saved'}#0" and second.image is None
    assert read_image(str(first.image), None).getpixel((0, 0)) == (9, 0, 0)


CASES = {
    "lf_images_notoken.json": ["image_token_missing"],
    "system.json": [Sample],
    "two_lists.json": [Sample, Sample],
    "eos_in_answer.json": [Sample],
}


@pytest.mark.parametrize("name", CASES)
def test_cases_from_public_bug_reports(shared_dir: Path, tmp_path: Path, name: str) -> None:
    path = shared_dir / "cases" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    (tmp_path / "a.png").write_bytes(plain_png(7))
    results = list(check_rows(iter_rows(path), tmp_path))
    assert [Sample if isinstance(result, Sample) else result.reason for result in results] == CASES[name]
    if name == "system.json":
        assert isinstance(results[0], Sample) and results[0].system == "You are a radiologist"
