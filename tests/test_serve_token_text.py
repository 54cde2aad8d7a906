"""Text of given tokens, with a SentencePiece tokenizer like those of real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from babydoctor.data.tokens import encode, load_tokenizer
from babydoctor.schema import IGNORE_INDEX, Segment
from babydoctor.serve.worker.resume import ResumedText, drops_first_space, label_rows

ANSWERS = ["No acute finding.", "CT of the chest", "é ü ∆ x", "a  b", "line\nbreak", "’quoted’"]


@pytest.fixture(scope="module")
def tokenizer(golden: Path):
    return load_tokenizer(golden / "base")


def answer_ids(tokenizer, answer: str) -> list[int]:
    example = encode((Segment("[INST] x [/INST]"), Segment(f" {answer}", supervised=True)), tokenizer, 16)
    return example.input_ids[example.labels != IGNORE_INDEX].tolist()


@pytest.mark.parametrize("answer", ANSWERS)
def test_pieces_join_to_the_answer_and_keep_their_rows(tokenizer, answer: str):
    assert drops_first_space(tokenizer)
    ids = answer_ids(tokenizer, answer)
    rows = np.arange(len(ids), dtype=np.float32)[:, None]
    pieces = label_rows(tokenizer, ids, rows, answer)
    assert "".join(piece["text"] for piece in pieces) == answer
    weights = [piece["weights"][0] for piece in pieces]
    assert weights == sorted(weights) and weights[-1] <= len(ids) - 1


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_resumed_answer_reads_the_same_wherever_it_was_interrupted(tokenizer, answer: str):
    ids = answer_ids(tokenizer, answer)
    for given in range(len(ids) + 1):
        text = ResumedText(tokenizer, ids[:given], ("</s>",), frozenset({tokenizer.eos_token_id}))
        assert (text.add(ids[given:]) + text.flush()).strip() == answer and not text.ended


def test_resuming_a_complete_answer_adds_nothing(tokenizer):
    eos = frozenset({tokenizer.eos_token_id})
    assert ResumedText(tokenizer, [*answer_ids(tokenizer, "No."), tokenizer.eos_token_id], (), eos).ended
    stopped = ResumedText(tokenizer, answer_ids(tokenizer, "No acute finding."), ("acute",), eos)
    assert stopped.ended and stopped.flush().strip() == "No"
