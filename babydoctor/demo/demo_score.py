"""Scoring of the demo: closed questions about held-out phantoms, with the right, a wrong and no image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from babydoctor.conversation import get_template, render_prompt
from babydoctor.phantom.text import KINDS, read_answer
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError

if TYPE_CHECKING:
    from babydoctor.model.run_dir import Run

CONDITIONS = ("right image", "shuffled image", "no image")
TEMPLATE = "llava_llama_2"
"""Questions are asked in the chat template after each stage, also after stage 1, which trained on captions."""

BATCH_SIZE = 128
MAX_NEW_TOKENS = 24
"""The longest lay answer has 13 tokens."""


@dataclass(frozen=True)
class Question:
    """One closed question about a held-out case; a line of ``questions.jsonl``."""

    id: str
    image: str
    kind: str
    question: str
    truth: str
    answer: str


def load_questions(phantoms: Path) -> list[Question]:
    """Read the closed questions about the held-out cases."""
    path = phantoms / "questions.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: make the phantoms with `babydoctor data phantom --out {phantoms}`")
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def chance(questions: Sequence[Question]) -> dict[str, float]:
    """For each kind the accuracy of the best constant answer."""
    counts = {kind: Counter(q.truth for q in questions if q.kind == kind) for kind in KINDS}
    return {kind: max(count.values()) / sum(count.values()) for kind, count in counts.items() if count}


def shuffled_images(questions: Sequence[Question], seed: int = 0, tries: int = 500) -> dict[str, str]:
    """Another case's image for each case.

    Of many random exchanges, the one whose truths agree as often as chance says, for each kind: what remains of a
    difference from chance is then the model's, not the luck of the draw.
    """
    images = sorted({q.image for q in questions})
    truth = {kind: {q.image: q.truth for q in questions if q.kind == kind} for kind in KINDS}
    rng = np.random.default_rng(seed)
    best: tuple[float, dict[str, str]] | None = None
    for _ in range(tries):
        order = [images[i] for i in rng.permutation(len(images))]
        other = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: no image keeps its place
        unfair = 0.0
        for kind in KINDS:
            shared = [image for image in truth[kind] if other[image] in truth[kind]]
            classes = len(set(truth[kind].values()))
            if shared:
                agree = sum(truth[kind][image] == truth[kind][other[image]] for image in shared) / len(shared)
                unfair = max(unfair, abs(agree - 1 / classes))
        if best is None or unfair < best[0]:
            best = (unfair, other)
    assert best is not None
    return best[1]


class Answerer:
    """Asks a run closed questions, greedily and in batches. The same image and question is asked once."""

    def __init__(self, run: Run, images: Path) -> None:
        self.run = run
        self.images = images
        self._known: dict[tuple[str, str | None], str] = {}

    def ask(self, requests: Sequence[tuple[str, str | None]], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """Answer (question, image name or None) pairs; the question holds ``<image>`` where there is an image."""
        from rich.progress import track

        new = [request for request in dict.fromkeys(requests) if request not in self._known]
        # Equal questions together: little padding.
        new.sort(key=lambda request: (request[1] is None, len(request[0]), request[0]))
        starts = range(0, len(new), BATCH_SIZE)
        for start in track(starts, description="asking", transient=True, disable=len(starts) < 2):
            batch = new[start : start + BATCH_SIZE]
            cut = sum(image is not None for _, image in batch)
            for part in (batch[:cut], batch[cut:]):  # with and without an image
                if part:
                    self._known.update(zip(part, self._generate(part, max_new_tokens), strict=True))
        return [self._known[request] for request in requests]

    def _generate(self, requests: Sequence[tuple[str, str | None]], max_new_tokens: int) -> list[str]:
        import torch

        from babydoctor.imaging.isolation import load_image
        from babydoctor.imaging.preprocess import to_pixels
        from babydoctor.model.generate import generate

        template = get_template(TEMPLATE)
        prompts = [render_prompt([Turn("user", question)], template) for question, _ in requests]
        pixels = [to_pixels(load_image(self.images / image), self.run.manifest.image) for _, image in requests if image]
        values = torch.from_numpy(np.stack(pixels)) if pixels else None
        answers = generate(self.run.model, self.run.tokenizer, prompts, values, max_new_tokens=max_new_tokens)
        return [answer.split(template.stop)[0].strip() for answer in answers]


def score(run: Run, phantoms: Path) -> dict[str, Any]:
    """Ask all questions under the three conditions.

    Returns:
        ``{"scores": {condition: {kind: {"total", "correct", "exact", "terms"}}}, "answers": {id: answer}}``.
        ``correct``: the answer says the truth, in whichever training set's wording; ``exact``: it is the radiology
        answer to the letter; ``terms``: it is one of the radiology answers, true or not. Counts.
    """
    questions = load_questions(phantoms)
    other = shuffled_images(questions)
    answerer = Answerer(run, phantoms / "images")
    scores: dict[str, dict[str, dict[str, int]]] = {}
    right: dict[str, str] = {}
    for condition in CONDITIONS:
        requests: list[tuple[str, str | None]] = [_request(q, condition, other) for q in questions]
        answers = answerer.ask(requests)
        if condition == "right image":
            right = {q.id: answer for q, answer in zip(questions, answers, strict=True)}
        scores[condition] = {kind: _count(kind, questions, answers) for kind in KINDS}
    return {"scores": scores, "answers": right}


def _request(question: Question, condition: str, other: dict[str, str]) -> tuple[str, str | None]:
    if condition == "no image":
        return question.question.replace(IMAGE_TOKEN, "").strip(), None
    return question.question, question.image if condition == "right image" else other[question.image]


def _count(kind: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, int]:
    pairs = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.kind == kind]
    readings = [read_answer(kind, answer) for _, answer in pairs]
    return {
        "total": len(pairs),
        "correct": sum(value == q.truth for (q, _), (value, _) in zip(pairs, readings, strict=True)),
        "exact": sum(answer == q.answer for q, answer in pairs),
        "terms": sum(in_terms for _, in_terms in readings),
    }


def accuracies(counts: dict[str, dict[str, int]], key: str = "correct") -> dict[str, float]:
    """Shares by kind, and their plain ``mean``."""
    by_kind = {kind: count[key] / max(1, count["total"]) for kind, count in counts.items()}
    return by_kind | {"mean": sum(by_kind.values()) / len(by_kind)}


@dataclass(frozen=True)
class Thresholds:
    """What the demo must reach on held-out phantoms."""

    mean: float = 0.85
    each: float = 0.75
    above_chance: float = 0.05
    """How far from chance the answers may be when the image is another case's."""


def shortfalls(
    last: dict[str, Any], before: dict[str, Any], by_chance: dict[str, float], thresholds: Thresholds | None = None
) -> list[str]:
    """What the last stage's score lacks, in words; empty when all is reached."""
    limits = thresholds or Thresholds()
    exact = accuracies(last["scores"]["right image"], "exact")
    wrong = accuracies(last["scores"]["shuffled image"])
    lacks = []
    if exact["mean"] < limits.mean:
        lacks.append(f"mean accuracy is {exact['mean']:.1%}, below {limits.mean:.0%}")
    for kind in KINDS:
        if exact[kind] < limits.each:
            lacks.append(f"{kind}: accuracy is {exact[kind]:.1%}, below {limits.each:.0%}")
        if abs(wrong[kind] - by_chance[kind]) > limits.above_chance:
            lacks.append(
                f"{kind}: {wrong[kind]:.1%} with shuffled images is more than {limits.above_chance:.0%} from "
                f"chance ({by_chance[kind]:.1%})"
            )
    speaks = accuracies(last["scores"]["right image"], "terms")["mean"]
    spoke = accuracies(before["scores"]["right image"], "terms")["mean"]
    if speaks < 0.95 or spoke > 0.05:
        lacks.append(f"radiology terms: {speaks:.1%} of the last stage's answers, {spoke:.1%} of those before it")
    return lacks
