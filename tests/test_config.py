"""The configuration is strict, and its errors name the key, the value and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from babydoctor.cli.main import build_app
from babydoctor.config import RunConfig, apply_override, build_config, changed_settings, dump_config, load_config
from babydoctor.config_file import iterate_keys
from babydoctor.schema import UserError
from babydoctor.serve.settings import ServeSettings, load_settings

CONFIGS = Path(__file__).parents[1] / "configs"

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
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
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


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothere\.yaml"):
        load_config(tmp_path / "nothere.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1"))
    with pytest.raises(UserError, match="keys and values"):
        load_config(write(tmp_path, "- 1"))


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = build_config(VALUES | {"lora": {"r": 4}, "train": {"learning_rate": 2e-5}})
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config and changed_settings(config, again) == {}


def test_changed_settings_name_the_key() -> None:
    old, new = build_config(VALUES), build_config(VALUES | {"train": {"seed": 7}})
    assert changed_settings(old, new) == {"train.seed": (42, 7)}


@pytest.mark.parametrize(
    ("key", "suggested"),
    [
        ("eval.image", r"did you mean 'eval\.images'\?"),
        ("data.image", r"did you mean 'data\.images'\?"),
        ("train.eval_limits", r"'data\.eval_limit'"),
        ("eval.eval_every", r"'train\.eval_every'"),
        ("data.learning_rat", r"'train\.learning_rate'"),
        ("trian.batch_size", r"'train\.batch_size'"),
        ("batch_size", r"'train\.batch_size'"),
        ("lora.rank", "lora has r, alpha, dropout, target_modules"),
        ("zzz", "babydoctor config"),
    ],
)
def test_a_mistyped_key_suggests_its_own_section_first(key: str, suggested: str) -> None:
    with pytest.raises(UserError, match=suggested):
        apply_override({}, f"{key}=1")


def test_a_union_is_reported_as_one_error() -> None:
    with pytest.raises(UserError, match=r"1 mistake.*\n  train\.micro_batch_tokens: .* or .*'auto', got 'many'"):
        build_config(VALUES | {"train": {"micro_batch_tokens": "many"}})


def test_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "align.yaml").touch()
    with pytest.raises(UserError, match=r"is a folder.*align\.yaml"):
        load_config(tmp_path)
    for content in (b"\x89PNG\r\n\x1a\n\x00", b"name: \x00"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match="not a text file"):
            load_config(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\ndata: {rows: [a}\n", r"line 2, column 16"),
        ("name: x\nname: y\n", r"line 2, column 1,.*'name' occurs twice"),
        ("name: a\n\tx: 1\n", r"line 2, column 1"),
    ],
)
def test_yaml_errors_give_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002"])
def test_training_and_serving_read_the_same_numbers(tmp_path: Path, text: str) -> None:
    """This includes fields without a schema, such as serving's engine section."""
    assert load_settings(None, [f"engine.value={text}"]).engine == {"value": 2e-4}
    assert load_settings(write(tmp_path, f"engine:\n  value: {text}\n")).engine == {"value": 2e-4}
    assert load_config(CONFIGS / "align.yaml", [f"train.learning_rate={text}"]).train.learning_rate == 2e-4


def test_shipped_configs_are_valid() -> None:
    for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("tiny/*.yaml")]:
        (load_settings if path.name == "serve.yaml" else load_config)(path)


def listed(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(), ["config", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("schema", "arguments"), [(RunConfig, ()), (ServeSettings, ("--serve",))])
def test_config_lists_every_key_with_type_default_and_meaning(schema: type, arguments: tuple[str, ...]) -> None:
    output = listed(*arguments)
    for key in iterate_keys(schema):
        if key.section is None and key.name != "engine":
            assert key.field.description, f"{key.name} has no description"
            last = key.name.rpartition(".")[2]
            lines = [line for line in output.splitlines() if f"{last}: " in line and key.field.description in line]
            assert lines and all("; required;" in line or "; default " in line for line in lines), key.name
    assert yaml.safe_load(output).keys() == schema.model_fields.keys()


def test_config_shows_the_values_of_a_file_as_yaml_that_loads_again(tmp_path: Path) -> None:
    path = CONFIGS / "instruct.yaml"
    output = listed(str(path), "train.learning_rate=1e-5", "train.max_steps=3")
    again = load_config(write(tmp_path, output))
    assert again == load_config(path, ["train.learning_rate=1e-5", "train.max_steps=3"])
    assert "engine" in listed("--serve", "engine.max_running=3")


def test_config_needs_a_file_for_overrides() -> None:
    result = CliRunner().invoke(build_app(), ["config", "train.max_steps=3"])
    assert isinstance(result.exception, UserError) and "configs/align.yaml" in str(result.exception)
