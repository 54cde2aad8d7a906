"""Generated radiology phantoms: data for the three stages on a machine that can download nothing.

A case is a modality, a finding (or none), the side and level where it lies and its size. All of these are balanced,
so that no constant answer does better than chance. ``write_phantoms`` draws the images and tells every case in the
formats of the three real training sets; the truth lies beside them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babydoctor.phantom import text
from babydoctor.phantom.drawing import draw
from babydoctor.schema import UserError

MODALITIES = ("radiograph", "ct", "mr", "ultrasound")
FINDINGS = ("none", "nodule", "cyst", "effusion", "fracture")
SIDES = ("left", "right")
LEVELS = ("upper", "middle", "lower")
SIZES_MM = {"small": (25.0, 34.0), "large": (46.0, 60.0)}
SPLITS = ("train", "held_out")
SETS = ("align", "instruct", "radiology")


@dataclass(frozen=True)
class Case:
    """The full truth of one phantom.

    ``side`` is the patient's side: by the radiological convention the patient's left is on the viewer's right.
    ``side``, ``level``, ``size`` and ``size_mm`` are None where there is no finding. ``noise_seed`` decides
    everything that means nothing: build, position within the level, exposure, noise.
    """

    id: str
    split: str
    image: str
    modality: str
    finding: str
    side: str | None
    level: str | None
    size: str | None
    size_mm: float | None
    noise_seed: int


def build_cases(split: str, count: int, seed: int) -> list[Case]:
    """Make ``count`` cases of one split. Every 240 cases hold each combination equally often, in random order."""
    # Each split has a random stream of its own, so that the number of cases of one does not change the other.
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    combinations = list(itertools.product(MODALITIES, FINDINGS, SIDES, LEVELS, SIZES_MM))
    cases: list[Case] = []
    while len(cases) < count:
        for place in rng.permutation(len(combinations)):
            modality, finding, side, level, size = combinations[place]
            number = len(cases)
            size_mm = round(float(rng.uniform(*SIZES_MM[size])), 1)
            noise_seed = int(rng.integers(2**53))
            normal = finding == "none"
            cases.append(
                Case(
                    id=f"phantom-{split}-{number:05d}",
                    split=split,
                    image=f"{split}_{number:05d}.png",
                    modality=modality,
                    finding=finding,
                    side=None if normal else side,
                    level=None if normal else level,
                    size=None if normal else size,
                    size_mm=None if normal else size_mm,
                    noise_seed=noise_seed,
                )
            )
    return cases[:count]


def load_cases(phantoms: Path, split: str) -> list[Case]:
    """Read the truth of one split from a folder that ``write_phantoms`` made."""
    path = phantoms / "truth.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: make the phantoms with `babydoctor data phantom --out {phantoms}`")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Case(**row) for row in rows if row["split"] == split]


def build_rows(cases: Sequence[Case], split: str, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of the three training sets (``align``, ``instruct``, ``radiology``) for the cases of one split."""
    rng = np.random.default_rng([seed, len(SPLITS), SPLITS.index(split)])
    return {
        "align": [text.align_row(case, rng) for case in cases],
        "instruct": [row for case in cases for row in text.instruct_rows(case, rng)],
        "radiology": [row for case in cases for row in text.radiology_rows(case, rng)],
    }


def _write_images(cases: Sequence[Case], folder: Path, size: int) -> dict[str, set[str]]:
    """Draw and save all cases; returns the SHA-256 of the pixels for each split."""
    from PIL import Image
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, set[str]] = {split: set() for split in SPLITS}
    for case in track(cases, description="drawing phantoms", transient=True):
        pixels = draw(case, size)
        digests[case.split].add(hashlib.sha256(pixels.tobytes()).hexdigest())
        Image.fromarray(pixels).save(folder / case.image, compress_level=3)
    return digests


def _write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_phantoms(out: Path, *, num_train: int, num_held_out: int, seed: int, size: int) -> None:
    """Write phantoms and their texts to the folder ``out``; the same arguments always give the same bytes.

    Writes ``images/*.png`` (grey, ``size`` pixels a side), ``{align,instruct,radiology}_{train,held_out}.json``
    (LLaVA JSON; ``image`` is relative to ``images/``), ``truth.jsonl`` (every case) and ``questions.jsonl`` (the
    closed questions about the held-out cases with their exact answers). Held-out cases come from a random stream of
    their own and never repeat a train case.

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
        for name, rows in build_rows(cases[split], split, seed).items():
            path = out / f"{name}_{split}.json"
            path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    _write_json_lines(out / "questions.jsonl", (row for case in cases["held_out"] for row in text.question_rows(case)))
    # Written last: the folder is complete when it is there.
    _write_json_lines(out / "truth.jsonl", (asdict(case) for split in SPLITS for case in cases[split]))
