"""Leakage: test images and questions that are also in the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babydoctor.data.problems import RowError
from babydoctor.data.row_formats import read_row
from babydoctor.data.sources import iter_rows
from babydoctor.eval.tasks import Question
from babydoctor.schema import IMAGE_TOKEN


def find_leakage(questions: Sequence[Question], train: Sequence[str], images: str | None = None) -> dict[str, Any]:
    """Compare the test images with the images of training rows.

    Two images are the same if their file names are equal. If ``images`` (the folder of the training images) is given,
    images with equal bytes are the same too: a renamed copy is found, a re-encoded one is not. Questions without an
    image are compared with rows without one.

    Returns counts and notes for the report. ``checked`` is False if ``train`` is empty.
    """
    test_names = {Path(question.image_key).name for question in questions if question.image is not None}
    report: dict[str, Any] = {"checked": bool(train), "num_test_images": len(test_names), "notes": []}
    if not train:
        shared = "Images" if test_names else "Questions"
        report["notes"].append(f"{shared} shared with train are unknown; give the training rows with --train.")
        return report
    train_names: dict[str, str] = {}
    train_pairs: set[tuple[str, str]] = set()
    for source in train:
        for _, row in iter_rows(source):
            name, texts = _read(row)
            if name:
                train_names.setdefault(Path(name).name, name)
            if name is not None:
                train_pairs |= {(Path(name).name, text) for text in texts}
    same_name = test_names & train_names.keys()
    same_bytes = _same_bytes(questions, [Path(images) / name for name in train_names.values()]) if images else set()
    seen = same_name | {Path(key).name for key in same_bytes}
    asked = sum((_name(question), question.prompt.lower()) in train_pairs for question in questions)
    report |= {
        "num_train_images": len(train_names),
        "num_same_name": len(same_name),
        "num_same_bytes": len(same_bytes) if images else None,
        "num_seen": len(seen),
        "num_same_question": asked,
    }
    if test_names:
        report["notes"].append(f"{len(seen)} of {len(test_names)} test images are also in train.")
    if asked or not test_names:
        how = " with the same image" if test_names else ""
        report["notes"].append(f"{asked} of {len(questions)} questions are in train{how}.")
    return report


def _name(question: Question) -> str:
    return "" if question.image is None else Path(question.image_key).name


def _read(row: Any) -> tuple[str | None, list[str]]:
    """Image name and questions of a training row. The name is empty without an image, and None for embedded images and
    for rows that cannot be read, which training leaves out."""
    try:
        content = read_row(row) if isinstance(row, dict) else None
    except RowError:
        content = None
    if content is None or isinstance(content.image, bytes):
        return None, []
    texts = [turn.text.replace(IMAGE_TOKEN, "").strip().lower() for turn in content.turns if turn.role == "user"]
    return content.image or "", texts


def _same_bytes(questions: Sequence[Question], train_images: Sequence[Path]) -> set[str]:
    """Keys of test images with the same bytes as a training image. Only files of equal size are read."""
    test: dict[int, dict[str, str]] = {}
    for question in questions:
        if question.image is None:
            continue
        data = question.image if isinstance(question.image, bytes) else question.image.read_bytes()
        test.setdefault(len(data), {})[hashlib.sha256(data).hexdigest()] = question.image_key
    found = set()
    for path in train_images:
        candidates = test.get(path.stat().st_size) if path.is_file() else None
        if candidates:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest in candidates:
                found.add(candidates[digest])
    return found


def read_train_sources(run: Path) -> tuple[list[str], str | None]:
    """The training rows and the image folder in a run's ``config.yaml``, if they exist on this machine."""
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        return [], None
    data = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data") or {}
    rows = data.get("rows") or []
    rows = [rows] if isinstance(rows, str) else rows
    images = data.get("images")
    return [row for row in rows if Path(row).is_file()], images if images and Path(images).is_dir() else None


def fingerprint_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
