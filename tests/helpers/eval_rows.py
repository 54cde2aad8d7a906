"""Rows of a tiny evaluation: questions about small images, two for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_rows(folder: Path, answers: Sequence[str]) -> Path:
    """Write ``rows.json`` and ``images/`` with a question for each answer, ``q0`` to ``qN``; returns ``rows.json``."""
    (folder / "images").mkdir()
    rows = []
    for number, answer in enumerate(answers):
        name = f"{number // 2}.png"
        Image.new("RGB", (40, 30), (number * 30, 80, 120)).save(folder / "images" / name)
        turns = [{"from": "human", "value": f"<image>\nQuestion {number}?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"q{number}", "image": name, "conversations": turns, "question_type": "PRES"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"
