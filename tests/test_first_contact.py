"""A new user's first questions to the trained tiny preset, from the web UI and over both APIs.

Training takes minutes, so these tests use the output of ``scripts/demo.sh``. ``.ci/run`` runs them after it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from babydoctor.demo.first_contact import KIND_OF, ask_everything, wrong_answers
from babydoctor.demo.robustness import is_correct
from babydoctor.phantom.case import DEMO_SEED, build_cases
from babydoctor.phantom.text import KINDS, OUTSIDE, term_reply
from babydoctor.serve.page.examples import build_examples
from babydoctor.serve.page.texts import QUESTIONS

ROOT = Path(__file__).parents[1]
DEMO = Path(os.environ.get("BABYDOCTOR_DEMO", ROOT / ".demo"))


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "radiology" / "manifest.json").is_file(), reason="scripts/demo.sh has not run")
def test_every_example_answers_every_first_question_in_every_way() -> None:
    answers = ask_everything(DEMO / "radiology")
    ways = {answer.way for answer in answers}
    assert ways == {"web UI", "web UI, same conversation", "LLaVA API", "OpenAI API"}
    assert len(answers) == 4 * (3 * len(KIND_OF) + len(QUESTIONS))
    assert not wrong_answers(answers)


def test_the_first_questions_are_those_of_the_web_ui_and_the_readme() -> None:
    examples = build_examples()
    assert {*QUESTIONS, *(example.question for example in examples if example.case)} <= set(KIND_OF)
    assert (
        "Which modality is this?" in KIND_OF and (ROOT / "README.md").read_text().count("Which modality is this?") == 2
    )


def test_the_examples_are_cases_of_the_held_out_split() -> None:
    held_out = build_cases("held_out", 480, DEMO_SEED)
    examples = [example.case for example in build_examples() if example.case]
    assert len(examples) == 4 and all(case in held_out for case in examples)


def test_a_correct_answer_says_what_was_asked_and_only_what_is_true() -> None:
    case = next(c for c in build_cases("held_out", 40, DEMO_SEED) if c.finding == "cyst" and c.modality == "mr")
    report = f"Coronal chest MRI shows a thin-walled cyst in the {case.side} {case.level}"
    report = report.replace("middle", "mid") + " zone."
    assert is_correct(report, "report", case) and not is_correct(report.replace("MRI", "CT"), "report", case)
    assert is_correct("mri", "modality", case) and not is_correct("MRI of the chest", "modality", case)
    assert is_correct(OUTSIDE, "outside", case)
    # A true answer may say more than was asked, not less.
    assert all(is_correct(report, kind, case) for kind in (*KINDS, "location"))
    assert not is_correct(term_reply("finding", case), "report", case)
    assert is_correct(term_reply("location", case), "side", case)
    assert not is_correct(term_reply("side", case), "location", case)
    assert not is_correct(report, "outside", case) and not is_correct(OUTSIDE, "report", case)
    assert not any(is_correct("", kind, case) for kind in KINDS)
