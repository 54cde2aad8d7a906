"""``babydoctor data`` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageDraw, ImageFont
from typer.testing import CliRunner, Result

from babydoctor.cli.data import register
from babydoctor.imaging.burned_in import is_available
from babydoctor.schema import UserError


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)  # typer drops the name of an only group
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def row(id: str, image: str | None, answer: str = "CT.") -> dict[str, Any]:
    question = "What?\n<image>" if image else "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_check_passes_good_rows(tmp_path: Path, images: Path) -> None:
    rows = write(tmp_path / "rows.json", [row("1", "a.png"), row("2", None), row("2", None, "MR.")])
    result = run("check", rows, "--images", images, "--bad", tmp_path / "bad.jsonl")
    assert result.exit_code == 0, result.output
    assert "3 of 3 rows are good; 1 images were decoded" in result.output
    assert "1 rows have the id of an earlier row" in result.output
    assert (tmp_path / "bad.jsonl").read_text() == ""


def test_check_lists_every_bad_row_and_exits_with_1(tmp_path: Path, images: Path) -> None:
    rows = [row("1", "a.png"), row("2", "cut.png"), row("3", "../x.png"), row("4", None, " "), row("5", "cut.png"), "x"]
    path = write(tmp_path / "rows.json", rows)
    result = run("check", path, "--images", images, "--bad", tmp_path / "bad.jsonl")
    assert result.exit_code == 1
    assert "5 of 6 rows are bad" in result.output and "1 of 6 rows are good" in result.output
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    reasons = {item["source"].rpartition("#")[2]: item["reason"] for item in listed}
    assert reasons == {
        "1": "image_undecodable",
        "2": "image_path",
        "3": "empty_answer",
        "4": "image_undecodable",
        "5": "not_a_row",
    }
    assert "cut.png" in next(item["detail"] for item in listed if item["reason"] == "image_undecodable")


def test_check_counts_tokens_when_a_tokenizer_is_given(tmp_path: Path, images: Path, golden: Path) -> None:
    long = row("2", "a.png", "word " * 400)
    two_exchanges = row("3", None) | {"conversations": row("3", None)["conversations"] * 2}
    path = write(tmp_path / "rows.json", [row("1", "a.png"), long, two_exchanges])
    common = ("check", path, "--images", images, "--bad", tmp_path / "bad.jsonl", "--tokenizer", golden / "base")
    assert run(*common, "--num-patches", "16").exit_code == 0
    result = run(*common, "--num-patches", "16", "--max-length", "200")
    assert result.exit_code == 1 and "1 too_long" in result.output
    result = run(*common, "--template", "plain")
    assert result.exit_code == 1 and "1 template" in result.output


def test_preview_as_json_equals_the_original_code_on_every_golden_row(tmp_path: Path, golden: Path) -> None:
    lines = (golden / "expected" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    expected: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        expected.setdefault(json.loads(line)["template"], []).append(json.loads(line))
    for template, references in expected.items():
        rows = []
        for index, reference in enumerate(references):
            has_image = any("<image>" in turn["value"] for turn in reference["turns"])
            image = {"image": "a.png"} if has_image else {}
            rows.append({"id": str(index), "conversations": reference["turns"]} | image)
        path = write(tmp_path / f"{template}.json", rows)
        result = run("preview", path, "--template", template, "--tokenizer", golden / "base", "--json")
        assert result.exit_code == 0, result.output
        shown = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(shown) == len(references) == 24
        for ours, reference in zip(shown, references, strict=True):
            assert ours["prompt"] == reference["prompt"] and ours["input_ids"] == reference["input_ids"]
            if "reference_note" not in reference:
                assert ours["labels"] == reference["labels"]
            else:
                assert any(label != -100 for label in ours["labels"])


def test_preview_shows_the_decoded_prompt(tmp_path: Path, golden: Path) -> None:
    path = write(tmp_path / "rows.json", [row(str(i), "a.png", f"Answer {i}.") for i in range(9)])
    result = run("preview", path, "--tokenizer", golden / "base", "--num-patches", "16")
    assert result.exit_code == 0 and "<image>*16\nWhat? [/INST] Answer 0. </s>" in result.output
    assert "Answer 4." in result.output and "Answer 5." not in result.output  # five rows by default
    result = run("preview", path, "--tokenizer", golden / "base", "--template", "plain", "--limit", "1")
    assert "<s><image>*256Answer 0.\n" in result.output.replace("<s> <image>", "<s><image>")


def test_preview_continues_after_a_bad_row_and_exits_with_1(tmp_path: Path, golden: Path) -> None:
    path = write(tmp_path / "rows.json", [row("1", None, ""), row("2", None)])
    result = run("preview", path, "--tokenizer", golden / "base", "--json")
    assert result.exit_code == 1 and "an answer without text" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_the_commands_prepare_data_sets(tmp_path: Path, shared_dir: Path) -> None:
    data = shared_dir / "data"
    result = run("roco", "--source", data / "roco", "--split", "validation", "--out", tmp_path / "roco")
    assert result.exit_code == 0, result.output
    assert "2 rows, 2 images" in result.output and "8,178 no_image, 1 image_without_row" in result.output
    rows, images = tmp_path / "roco" / "validation.json", tmp_path / "roco" / "images"
    assert run("check", rows, "--images", images, "--bad", tmp_path / "bad.jsonl").exit_code == 0
    result = run("vqa-rad", "--source", data / "vqa-rad", "--out", tmp_path / "vqa")
    assert result.exit_code == 0 and "1,797 rows, 313 images" in result.output
    rows, images = tmp_path / "vqa" / "train.json", tmp_path / "vqa" / "images"
    result = run("check", rows, "--images", images, "--bad", tmp_path / "bad.jsonl")
    assert result.exit_code == 0 and "313 images were decoded" in result.output


def test_the_command_writes_phantoms_without_problems(tmp_path: Path) -> None:
    result = run("phantom", "--out", tmp_path, "--num-train", "20", "--num-held-out", "20", "--size", "56")
    assert result.exit_code == 0, result.output
    sets = [
        tmp_path / f"{name}_{split}.json"
        for name in ("align", "instruct", "radiology")
        for split in ("train", "held_out")
    ]
    result = run("check", *sets, "--images", tmp_path / "images", "--bad", tmp_path / "bad.jsonl")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lcs", "--out", "o"), "give --source DIR"),
        (("instruct", "--out", "o", "--source", "nowhere"), "nowhere: no such directory"),
        (("lcs", "--out", "o", "--download"), "By hand"),
        (("roco", "--out", "o", "--split", "train", "--download", "--disjoint-from", "x"), "licences.txt"),
        (("check", "nothing.json"), "no such file"),
    ],
)
def test_wrong_arguments_are_user_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, babydoctor.cli.data as c, typer; c.register(typer.Typer()); "
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich.progress', 'pydicom', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not is_available(), reason="the extra ocr is not installed")
def test_check_finds_burned_in_text(tmp_path: Path, images: Path) -> None:
    scan = Image.new("RGB", (300, 200), (40, 40, 40))
    scan.save(images / "clean.png")
    ImageDraw.Draw(scan).text((20, 20), "Doe, Jane 12/03/1957", font=ImageFont.load_default(20), fill="white")
    scan.save(images / "named.png")
    rows = write(tmp_path / "rows.json", [row("1", "clean.png"), row("2", "named.png"), row("3", "cut.png")])
    result = run("check", rows, "--images", images, "--bad", tmp_path / "bad.jsonl", "--burned-in-text")
    assert result.exit_code == 1
    problems = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(p["id"], p["reason"]) for p in problems] == [("3", "image_undecodable"), ("2", "burned_in_text")]
    assert problems[1]["detail"].startswith("named.png: 1 ")
    assert "Doe" not in result.output + (tmp_path / "bad.jsonl").read_text()


def test_check_names_the_extra_that_burned_in_text_needs(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("babydoctor.imaging.burned_in.reader.is_available", lambda: False)
    rows = write(tmp_path / "rows.json", [row("1", "a.png")])
    result = run("check", rows, "--images", images, "--bad", tmp_path / "bad.jsonl", "--burned-in-text")
    assert isinstance(result.exception, UserError) and "babydoctor[ocr]" in str(result.exception)
