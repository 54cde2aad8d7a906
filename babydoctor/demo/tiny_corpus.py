"""The texts that the tiny base LLaMA reads before it meets images.

Half of them name the topic of a question. The others are conversations, most with a description in place of the image,
plain sentences, and radiology reports and records.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from babydoctor.conversation import get_template, prompt_text, render
from babydoctor.phantom import rows, text
from babydoctor.phantom.asking import ask
from babydoctor.phantom.case import Case
from babydoctor.schema import Turn

TEMPLATE = "llava_llama_2"

TOPICS = {
    "modality": "method",
    "finding": "finding",
    "side": "side",
    "level": "height",
    "location": "place",
    "report": "description",
    "outside": "other",
}
"""What each kind of request is about, in a word."""


def build_corpus(cases: Sequence[Case], count: int, seed: int) -> list[str]:
    """Text-only training documents for a chat model: ``count`` documents in seeded order."""
    rng = np.random.default_rng([seed, 2])
    corpus: list[str] = []
    for number in range(count):
        case = cases[int(rng.integers(len(cases)))]
        kind = number % 20
        if kind < 10:
            corpus.append(_topic(case, rng))
        elif kind < 12:
            corpus.append(_question(case, rng))
        elif kind < 18:
            corpus.append(_conversation(case, rng))
        elif kind == 18:
            corpus.append(f"{text.lay_description(case)}\n{text.caption(case)}\n</s>")
        else:
            parts = [text.report(case), text.record(case, rng)]
            corpus.append("\n".join(parts[i] for i in rng.permutation(2)) + "</s>")
    return corpus


def _topic(case: Case, rng: np.random.Generator) -> str:
    """A question and its topic in one word.

    It is as short as possible and has one right answer, so the model meets thousands of wordings and learns what each
    asks for. Replies to the question itself teach that much more slowly, because most of their tokens are about a case.
    """
    kinds = [*TOPICS, "outside"]  # the most varied ones come twice
    kind = kinds[int(rng.integers(len(kinds)))]
    turns = [Turn("user", f"Which topic? {ask(kind, case.finding, rng)}"), Turn("assistant", TOPICS[kind])]
    return prompt_text(render(turns, get_template(TEMPLATE), system=""))


def _question(case: Case, rng: np.random.Generator) -> str:
    """One question without any description, and a reply about a random case.

    It teaches which form of reply each wording asks for.
    """
    ((question, answer),) = rows.lay_turns(case, rng, 1)
    turns = [Turn("user", question), Turn("assistant", answer)]
    return prompt_text(render(turns, get_template(TEMPLATE), system=""))


def _conversation(case: Case, rng: np.random.Generator) -> str:
    """Questions about a case, with a description of it in place of the image, and one about something else.

    Most conversations are short and have no system prompt, so most of the tokens are questions and answers.
    """
    is_long = rng.random() < 0.15
    turns = rows.lay_turns(case, rng, 4 if is_long else int(rng.integers(1, 3)))
    description = text.caption(case) if rng.random() < 0.7 else text.lay_description(case)
    first = (description, turns[0][0]) if rng.random() < 0.7 else (turns[0][0], description)
    turns[0] = ("\n".join(first), turns[0][1])
    if rng.random() < 0.15:
        turns.append(rows.GENERAL[int(rng.integers(len(rows.GENERAL)))])
    rendered: list[Turn] = []
    for question, answer in turns:
        rendered += [Turn("user", question), Turn("assistant", answer)]
    return prompt_text(render(rendered, get_template(TEMPLATE), system=None if is_long else ""))
