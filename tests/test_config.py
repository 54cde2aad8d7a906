"""The configuration: strict, with messages that name the key, the value and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from babydoctor.config import build_config, changed_settings, dump_config, load_config
from babydoctor.schema import UserError

VALUES: dict[str, Any] = {
    "name": "x",
    "output_dir": "out",
    "model": {"language_model": "llama", "vision_tower": "clip"},
    "data": {"rows": "rows.json"},
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"rows": "r", "templat": "v1"}}, r"'data\.templat'; did you mean 'data\.template'"),
        ({"train": {"learning_rate": -1}}, r"train\.learning_rate.*greater than 0, got -1"),
        ({"data": {"rows": "r", "template": "vicuna"}}, "vicuna.*llava_llama_2"),
        ({"trainable": []}, "nothing would train"),
        ({"model": {}}, r"model\.language_model"),
        ({"train": {"micro_batch_tokens": 100}}, r"train\.micro_batch_tokens=100 is below data\.max_length=2048"),
        ({"train": {"gradient_checkpointing": "every"}}, "every:K"),
        ({"data": {}}, r"'data\.rows' is missing"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(VALUES | change)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\noutput_dir: o\nmodel: {language_model: a, vision_tower: b}\ndata: {rows: r}\n")
    config = load_config(path, ["train.learning_rate=3e-4", "lora.r=8", "data.rows=[a, b]", "train.max_steps=null"])
    assert config.train.learning_rate == 3e-4
    assert config.lora is not None and config.lora.r == 8
    assert config.data.rows == ("a", "b")
    with pytest.raises(UserError, match=r"did you mean 'train\.learning_rate'"):
        load_config(path, ["train.learning=1"])
    with pytest.raises(UserError, match="key=value"):
        load_config(path, ["train.max_steps"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothere\.yaml"):
        load_config(tmp_path / "nothere.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1"))
    with pytest.raises(UserError, match="keys and values"):
        load_config(write(tmp_path, "- 1"))


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    config = build_config(VALUES | {"lora": {"r": 4}, "train": {"learning_rate": 2e-5}})
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config and changed_settings(config, again) == {}


def test_changed_settings_name_the_key() -> None:
    old, new = build_config(VALUES), build_config(VALUES | {"train": {"seed": 7}})
    assert changed_settings(old, new) == {"train.seed": (42, 7)}
