"""The truth of a radiology phantom, and balanced sets of cases."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babydoctor.files import split_lines
from babydoctor.schema import UserError

MODALITIES = ("radiograph", "ct", "mr", "ultrasound")
FINDINGS = ("none", "nodule", "cyst", "effusion", "fracture")
SIDES = ("left", "right")
LEVELS = ("upper", "middle", "lower")
SIZES_MM = {"small": (25.0, 34.0), "large": (46.0, 60.0)}
SPLITS = ("train", "held_out")

DEMO_SEED = 7
"""Seed of the demo's cases. The web UI's examples are cases of its held-out split."""


@dataclass(frozen=True)
class Case:
    """The full truth of one phantom.

    ``side`` is the patient's side. By the radiological convention, the patient's left is on the viewer's right.
    ``side``, ``level``, ``size`` and ``size_mm`` are None for a normal case. ``noise_seed`` sets all variation that
    carries no meaning: body build, position within the level, exposure and noise.
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
    """Make ``count`` cases of one split in random order. Each combination occurs equally often in 240 cases."""
    # Each split has its own random stream, so the number of cases in one split does not change the other.
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
    """Read the cases of one split from a folder that ``write_phantoms`` wrote.

    Raises:
        UserError: the folder has no ``truth.jsonl``.
    """
    path = phantoms / "truth.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; make the phantoms with `babydoctor data phantom --out {phantoms}`")
    rows = [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]
    return [Case(**row) for row in rows if row["split"] == split]
