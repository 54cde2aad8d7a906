"""VQA-RAD: clinicians' questions and answers about 314 radiology images (CC0), as instruction rows.

Lau et al., "A dataset of clinically generated visual questions and answers about radiology images", Scientific Data
2018; https://osf.io/89kps. Nearly every image of its test split is also in train: see ``--hold-out-images``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from babydoctor.data.sets.files import PreparedSplit, gather_images, link_folder, unpack_zip, write_left_out, write_rows
from babydoctor.data.sets.hub import download_url
from babydoctor.schema import IMAGE_TOKEN, UserError

URL = "https://files.osf.io/v1/resources/89kps/providers/osfstorage/?zip="
ARCHIVE = "vqa-rad.zip"
NUM_QUESTIONS = {"train": 1_797, "test": 451}
KEPT_KEYS = ("qid", "question_type", "answer_type", "phrase_type", "image_organ")
"""Keys that rows keep for evaluation. Training ignores them."""


def download_vqa_rad(folder: Path) -> Path:
    """Download the official archive into ``folder`` and unpack it."""
    unpack_zip(download_url(URL, folder / ARCHIVE), folder)
    return folder


def read_questions(source: Path) -> list[dict[str, Any]]:
    """Every question of the official JSON files in ``source``, in order. Raises ``UserError`` if there is none."""
    questions: list[dict[str, Any]] = []
    for path in sorted(source.glob("*.json")):
        try:
            loaded = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if isinstance(loaded, list) and loaded and isinstance(loaded[0], dict) and "image_name" in loaded[0]:
            questions += loaded
    if not questions:
        raise UserError(f"{source}: no JSON file with VQA-RAD's questions (objects with image_name, question, answer)")
    return questions


def find_images(source: Path, name: str) -> Path:
    """The folder of the images, found by the name of one image."""
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise UserError(f"{source}: no images here ({name} is in none of the {len(folders)} folders searched)")


def build_row(question: dict[str, Any]) -> dict[str, Any]:
    """One official object as a row. Its answer may be a number, and its ``answer_type`` may end with a space."""
    row: dict[str, Any] = {
        "id": f"vqa-rad-{question['qid']}",
        "image": question["image_name"],
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{str(question['question']).strip()}"},
            {"from": "gpt", "value": str(question["answer"]).strip()},
        ],
    }
    return row | {key: str(question[key]).strip() for key in KEPT_KEYS if key in question}


def prepare_vqa_rad(
    source: Path, out: Path, *, hold_out_images: float = 0.0, seed: int = 0, copy: bool = False
) -> list[PreparedSplit]:
    """Write ``out/train.json`` and, if there are test rows (``phrase_type`` begins with "test"), ``out/test.json``.

    ``hold_out_images`` moves this share of the training images, with all their questions, to ``out/held_out.json``,
    so that no image is in both files.
    """
    if not 0 <= hold_out_images < 1:
        raise UserError(f"hold-out-images {hold_out_images}: must be at least 0 and below 1")
    questions = read_questions(source)
    images = find_images(source, questions[0]["image_name"])
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    left_out: list[dict[str, Any]] = []
    for question in questions:
        missing = [key for key in ("qid", "image_name", "question", "answer") if not str(question.get(key, "")).strip()]
        if missing:
            left_out.append({"reason": f"no_{missing[0]}", "id": str(question.get("qid", "")), "image": ""})
            continue
        row = build_row(question)
        if (images / row["image"]).is_file():
            splits["test" if row.get("phrase_type", "").startswith("test") else "train"].append(row)
        else:
            left_out.append({"reason": "no_image", "id": row["id"], "image": row["image"]})
    if hold_out_images:
        splits["train"], splits["held_out"] = _split_by_image(splits["train"], hold_out_images, seed)
    list_path = out / "left-out.jsonl"
    counts = write_left_out(list_path, left_out)
    names = [row["image"] for rows in splits.values() for row in rows]
    target = gather_images(images, out, names, copy=True) if copy else link_folder(images, out)
    prepared = []
    for name, rows in splits.items():
        if rows:
            expected = None if hold_out_images and name != "test" else NUM_QUESTIONS[name]
            prepared.append(_write_split(name, rows, splits["train"], target, out, expected))
    # Rows left out belong to no particular split, so they are reported once, with the first split.
    first = prepared[0]
    prepared[0] = PreparedSplit(**{**vars(first), "left_out": counts, "left_out_list": list_path})
    return prepared


def _write_split(
    name: str,
    rows: Sequence[dict[str, Any]],
    train: Sequence[dict[str, Any]],
    images: Path,
    out: Path,
    expected: int | None,
) -> PreparedSplit:
    names = {row["image"] for row in rows}
    shared = names & {row["image"] for row in train}
    note = f"{len(shared)} of its {len(names)} images are also in train" if name != "train" else ""
    return PreparedSplit(
        rows=out / f"{name}.json",
        images=images,
        num_rows=write_rows(out / f"{name}.json", rows),
        num_images=len(names),
        num_read=len(rows),
        num_expected=expected,
        notes=(note,) if note else (),
    )


def _split_by_image(
    rows: list[dict[str, Any]], share: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    names = sorted({row["image"] for row in rows})
    random.Random(seed).shuffle(names)
    held = set(names[: round(len(names) * share)])
    return [row for row in rows if row["image"] not in held], [row for row in rows if row["image"] in held]
