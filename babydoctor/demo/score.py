"""Score a run's closed answers on held-out phantoms: with the right image, with another case's, and with none.

An answer counts when the whole of it is one of the answers that the training sets use; nothing is searched for inside
longer text. Chance is what the best constant answer to a kind of question would reach.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from babydoctor.conversation import get_template, render_prompt
from babydoctor.data import show_progress
from babydoctor.image import load_image, to_pixels
from babydoctor.model.checkpoint import Run, load_run, write_json
from babydoctor.model.generate import generate
from babydoctor.prepare.phantom_text import KINDS, read_answer
from babydoctor.schema import IMAGE_TOKEN, Turn

CONDITIONS = ("right", "shuffled", "none")
"""The case's own image, another case's, no image at all."""

BATCH_SIZE = 256

TEMPLATE = "llava_llama_2"
"""Questions are asked as conversations, also of a run that was trained on captions."""


@dataclass(frozen=True)
class StageScore:
    """How one run answers.

    ``accuracy[condition][kind]`` is a share of exact answers; ``chance[kind]`` the best constant answer's.
    ``radiology_terms`` is the share of answers (right image) that are a radiology term. ``answers`` holds each
    question with its answer, right image.
    """

    name: str
    accuracy: dict[str, dict[str, float]]
    chance: dict[str, float]
    radiology_terms: float
    num_cases: int
    answers: list[dict[str, Any]]

    def mean(self, condition: str) -> float:
        """Mean over the kinds of questions."""
        return float(np.mean([self.accuracy[condition][kind] for kind in KINDS]))

    @property
    def mean_chance(self) -> float:
        return float(np.mean([self.chance[kind] for kind in KINDS]))


def score_run(path: Path, phantoms: Path, *, name: str) -> StageScore:
    """Ask a run every closed question about every held-out case. Cached in ``path/phantom_score.json``."""
    cache = path / "phantom_score.json"
    if cache.is_file():
        return StageScore(**json.loads(cache.read_text(encoding="utf-8")))
    run = load_run(path)
    questions = [json.loads(line) for line in (phantoms / "questions.jsonl").read_text().splitlines()]
    pixels = load_pixels(run, phantoms, sorted({question["image"] for question in questions}))
    stranger = shuffle_images(sorted(pixels))
    answers: dict[str, list[str]] = {}
    for condition in CONDITIONS:
        shown = {image: pixels[stranger[image] if condition == "shuffled" else image] for image in pixels}
        answers[condition] = ask(run, questions, None if condition == "none" else shown, f"{name}, {condition} image")
    terms = [read_answer(q["kind"], a)[1] for q, a in zip(questions, answers["right"], strict=True)]
    score = StageScore(
        name=name,
        accuracy={condition: accuracy(questions, given) for condition, given in answers.items()},
        chance=chance(questions),
        radiology_terms=float(np.mean(terms)),
        num_cases=len(pixels),
        answers=[{**q, "given": a} for q, a in zip(questions, answers["right"], strict=True)],
    )
    write_json(cache, score.__dict__)
    return score


def load_pixels(run: Run, phantoms: Path, images: Sequence[str]) -> dict[str, np.ndarray]:
    """Pixels ``[3, S, S]`` of each image."""
    return {image: to_pixels(load_image(phantoms / "images" / image), run.manifest.image) for image in images}


def shuffle_images(images: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Give each image another one's place: a random cycle, so that none keeps its own."""
    order = np.random.default_rng(seed).permutation(len(images))
    return {images[order[i]]: images[order[i - 1]] for i in range(len(images))}


def ask(
    run: Run, questions: Sequence[dict[str, Any]], pixels: dict[str, np.ndarray] | None, description: str
) -> list[str]:
    """Greedy answers, in batches; without ``pixels`` the image is left out of the question."""
    template = get_template(TEMPLATE)
    answers: list[str] = []
    starts = range(0, len(questions), BATCH_SIZE)
    for start in show_progress(starts, description, total=len(starts)):
        batch = questions[start : start + BATCH_SIZE]
        texts = [q["question"] if pixels else q["question"].replace(IMAGE_TOKEN, "").strip() for q in batch]
        prompts = [render_prompt([Turn("user", text)], template) for text in texts]
        images = torch.from_numpy(np.stack([pixels[q["image"]] for q in batch])) if pixels else None
        answers += generate(run.model, run.tokenizer, prompts, images, max_new_tokens=24)
    return answers


def accuracy(questions: Sequence[dict[str, Any]], answers: Sequence[str]) -> dict[str, float]:
    """Share of exact answers by kind of question."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question, answer in zip(questions, answers, strict=True):
        kind = question["kind"]
        right[kind].append(read_answer(kind, answer)[0] == question["truth"])
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def chance(questions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of the best constant answer by kind of question."""
    truths = {kind: Counter(q["truth"] for q in questions if q["kind"] == kind) for kind in KINDS}
    return {kind: max(counts.values()) / sum(counts.values()) for kind, counts in truths.items()}


def shortfalls(scores: Sequence[StageScore]) -> list[str]:
    """What the last stage's score falls short in, in words; nothing where it holds.

    It holds when right images are answered (mean 85%, each kind 75%), shuffled images bring chance (5 points), and
    the last stage speaks in radiology terms where the one before does not.
    """
    before, last = scores[-2], scores[-1]
    found = []
    if last.mean("right") < 0.85:
        found.append(f"mean accuracy {last.mean('right'):.1%} is below 85%")
    found += [
        f"{kind} accuracy {value:.1%} is below 75%" for kind, value in last.accuracy["right"].items() if value < 0.75
    ]
    if abs(last.mean("shuffled") - last.mean_chance) > 0.05:
        found.append(
            f"with shuffled images {last.mean('shuffled'):.1%}, more than 5 points from {last.mean_chance:.1%}"
        )
    if last.radiology_terms < 0.9 or before.radiology_terms > 0.1:
        found.append(
            f"radiology terms in {last.radiology_terms:.0%} of the answers after {last.name}, "
            f"{before.radiology_terms:.0%} after {before.name}"
        )
    return found
