"""Prepare published data sets from small files, by command and by function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from typer.testing import CliRunner

from babydoctor.cli.data_sets import register
from babydoctor.data.rows import Sample, check_rows, load_rows
from babydoctor.data.sets.files import PreparedSplit


def run_data(*arguments: str | Path) -> str:
    """Run ``babydoctor data ARGUMENTS``, which must succeed, and return its output."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def save_image(path: Path) -> None:
    """Write a small gray image, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 50).save(path)


def good_rows(split: PreparedSplit) -> list[dict[str, Any]]:
    """The rows of a split, which must all be good."""
    assert all(isinstance(result, Sample) for result in check_rows(load_rows(split.rows), split.images))
    return json.loads(split.rows.read_text(encoding="utf-8"))
