"""Generated radiology phantoms: training data for machines that cannot download any.

``write_phantoms`` draws the images of a balanced set of cases and writes them as rows in the formats of the three real
training sets, next to the truth. All attributes are balanced, so no constant answer beats chance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from babydoctor.phantom import rows
from babydoctor.phantom.case import SPLITS, Case, build_cases
from babydoctor.phantom.drawing import draw
from babydoctor.progress import show_progress
from babydoctor.schema import UserError


def build_rows(cases: Sequence[Case], split: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of the three training sets (``align``, ``instruct``, ``radiology``) for the cases of one split."""
    rng = np.random.default_rng([seed, len(SPLITS), SPLITS.index(split)])
    return {
        "align": [rows.align_row(case, rng) for case in cases],
        "instruct": [row for case in cases for row in rows.instruct_rows(case, rng)],
        "radiology": [row for case in cases for row in rows.radiology_rows(case, rng)],
    }


def _write_images(cases: Sequence[Case], folder: Path, size: int) -> dict[str, set[str]]:
    """Draw and save all cases. Returns the SHA-256 digests of the pixels for each split."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, set[str]] = {split: set() for split in SPLITS}
    for case in show_progress(cases, "drawing phantoms"):
        pixels = draw(case, size)
        digests[case.split].add(hashlib.sha256(pixels.tobytes()).hexdigest())
        Image.fromarray(pixels).save(folder / case.image, compress_level=3)
    return digests


def _write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_phantoms(out: Path, *, num_train: int, num_held_out: int, seed: int, size: int) -> None:
    """Write phantoms and their texts to the folder ``out``. The same arguments always give the same bytes.

    Writes ``images/*.png`` (grayscale, ``size`` pixels a side), ``{align,instruct,radiology}_{train,held_out}.json``
    (LLaVA JSON; ``image`` is relative to ``images/``), ``truth.jsonl`` (every case) and ``questions.jsonl`` (closed
    questions about the held-out cases with their exact answers). Held-out cases have their own random stream and never
    repeat a training case.

    Raises:
        UserError: a count is not positive, or the size is too small to show a finding.
    """
    for name, value, least in (("num_train", num_train, 1), ("num_held_out", num_held_out, 1), ("size", size, 56)):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    cases = {"train": build_cases("train", num_train, seed), "held_out": build_cases("held_out", num_held_out, seed)}
    digests = _write_images([case for split in SPLITS for case in cases[split]], out / "images", size)
    repeated = digests["train"] & digests["held_out"]
    assert not repeated, f"{len(repeated)} held-out images are also in train"
    for split in SPLITS:
        for name, set_rows in build_rows(cases[split], split, seed).items():
            path = out / f"{name}_{split}.json"
            path.write_text(json.dumps(set_rows, indent=1) + "\n", encoding="utf-8")
    _write_json_lines(out / "questions.jsonl", (row for case in cases["held_out"] for row in rows.question_rows(case)))
    # Written last: its presence marks the folder as complete.
    _write_json_lines(out / "truth.jsonl", (asdict(case) for split in SPLITS for case in cases[split]))
