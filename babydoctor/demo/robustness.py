"""Score the last stage with other wordings, other image sizes and sampling at temperature 1.

The score table asks each kind of question in one wording, about images of 84 px, with greedy decoding. People ask in
their own words, load larger images, and use OpenAI's API with its default temperature of 1. An answer must say what was
asked, and all of it must be true.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from babydoctor.eval.metrics import normalize
from babydoctor.files import write_json
from babydoctor.imaging.preprocess import to_pixels
from babydoctor.inference import Inference, Query, user_turn
from babydoctor.model.run_dir import Run, load_run
from babydoctor.phantom.asking import ask
from babydoctor.phantom.case import Case, load_cases
from babydoctor.phantom.drawing import draw
from babydoctor.phantom.text import KINDS, QUESTIONS, asked_kinds, term_reply

WORDED_KINDS = (*KINDS, "location", "report", "outside")
NUM_WORDINGS, NUM_SIZED_CASES, NUM_SAMPLED = 64, 120, 200
SIZES = (84, 224, 512)
BATCH_SIZE = 64
MAX_NEW_TOKENS = 32
"""The longest report and the reply to an outside question have 21 tokens."""


SAYS_MORE = {
    "modality": ("report",),
    "finding": ("report",),
    "side": ("location", "report"),
    "level": ("location", "report"),
    "location": ("report",),
}
"""Kind of question -> kinds whose reply contains its reply."""


@dataclass(frozen=True)
class Asked:
    """A question about a phantom, with the group that its result counts for."""

    group: str
    kind: str
    case: Case
    question: str
    size: int = 84
    temperature: float = 0.0


def is_correct(answer: str, kind: str, case: Case) -> bool:
    """True if the answer says what was asked, and all of it is true.

    The whole answer must be one of the case's replies in radiology terms, except for capitals and punctuation. A reply
    that says more than was asked is right too: "Left or right, where is it?" asks for the side or for the location.
    """
    return normalize(answer) in {normalize(term_reply(other, case)) for other in (kind, *SAYS_MORE.get(kind, ()))}


def build_questions(cases: Sequence[Case], seed: int = 0) -> list[Asked]:
    """All questions of the measurement about held-out cases."""
    rng = np.random.default_rng(seed)
    with_finding = [case for case in cases if case.finding != "none"]

    def case_for(kind: str) -> Case:
        return _choose(with_finding if kind in ("side", "level", "location") else cases, rng)

    asked = []
    for held_out, kind, _ in itertools.product((False, True), WORDED_KINDS, range(NUM_WORDINGS)):
        case = case_for(kind)
        split = "held-out" if held_out else "trained"
        asked.append(Asked(f"{split}/{kind}", kind, case, ask(kind, case.finding, rng, held_out=held_out)))
    for size, case in itertools.product(SIZES, cases[:NUM_SIZED_CASES]):
        for kind in asked_kinds(case):
            asked.append(Asked(f"{size} px/{kind}", kind, case, QUESTIONS[kind][0], size=size))
    for _ in range(NUM_SAMPLED):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        case = case_for(kind)
        asked.append(Asked(f"temperature 1/{kind}", kind, case, QUESTIONS[kind][0], temperature=1.0))
    return asked


def measure(phantoms: Path, run_path: Path, out: Path, progress: Callable[[int, int], None]) -> None:
    """Ask all questions and write the accuracy of each group and every wrong answer to ``out`` (JSON)."""
    run = load_run(run_path)
    asked = build_questions(load_cases(phantoms, "held_out"))
    results: dict[str, list[bool]] = {}
    wrong = []
    queries = [_query(item, run, number, np.zeros(0)) for number, item in enumerate(asked)]
    with Inference.for_queries(run.model, run.tokenizer, run.manifest, queries, batch_size=BATCH_SIZE) as inference:
        for number, (item, answer) in enumerate(zip(asked, inference.answers(_queries(asked, run)), strict=True), 1):
            correct = is_correct(answer.text, item.kind, item.case)
            results.setdefault(item.group, []).append(correct)
            if not correct:
                right = term_reply(item.kind, item.case)
                wrong.append({"group": item.group, "question": item.question, "answer": answer.text, "right": right})
            progress(number, len(asked))
    figures = {group: {"accuracy": sum(of) / len(of), "num_questions": len(of)} for group, of in results.items()}
    write_json(out, {"groups": figures, "wrong": wrong})


def _queries(asked: Sequence[Asked], run: Run) -> Iterator[Query]:
    @lru_cache(maxsize=1)  # the questions about a drawing of 512 px follow each other
    def pixels(case: Case, size: int) -> np.ndarray:
        return to_pixels(Image.fromarray(draw(case, size)).convert("RGB"), run.manifest.image)

    for number, item in enumerate(asked):
        yield _query(item, run, number, pixels(item.case, item.size))


def _query(item: Asked, run: Run, number: int, pixels: np.ndarray) -> Query:
    return Query(
        [user_turn(item.question, has_image=True)],
        pixels,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=item.temperature,
        seed=number,
        id=f"{item.group} {item.case.id}",
    )


def _choose(cases: Sequence[Case], rng: np.random.Generator) -> Case:
    return cases[int(rng.integers(len(cases)))]
