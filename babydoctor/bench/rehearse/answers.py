"""Compare answers of one model that was loaded in different ways. Free of torch, so the rehearsal stays small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class AnswerTensors:
    """An answer: ``tokens`` ``[N]`` are the model's greedy tokens, ``logits`` ``[N, V]`` those at the reference's
    tokens.

    ``prompt`` ``[T]`` holds the ids of the prompt's text, without image slots. ``without_lora`` ``[N, V]`` holds the
    logits with the run's adapter switched off, or is None if there is no adapter.
    """

    tokens: np.ndarray
    logits: np.ndarray
    prompt: np.ndarray
    without_lora: np.ndarray | None = None


def differences(reference: AnswerTensors, other: AnswerTensors, tolerance: float) -> tuple[str, list[str]]:
    """Describe the difference between two answers, and list what is wrong.

    Greedy tokens must be equal. Where they first differ, the logits of the two candidates must be so close in the
    reference that rounding can decide. Later tokens continue different texts and are not compared.
    """
    vocab_size = reference.logits.shape[1]
    scale = float(np.abs(reference.logits).max())
    distance = float(np.abs(reference.logits - other.logits[:, :vocab_size]).max()) / scale
    faults = []
    if not np.array_equal(reference.prompt, other.prompt):
        faults.append("the prompt has other tokens")
    if distance > tolerance:
        faults.append(f"logits differ by {distance:.2%} of the largest, at most {tolerance:.0%} is allowed")
    apart = np.flatnonzero(reference.tokens != other.tokens)
    num_equal = int(apart[0]) if len(apart) else len(reference.tokens)
    if len(apart):
        row = reference.logits[num_equal]
        gap = float(row[reference.tokens[num_equal]] - row[other.tokens[num_equal]]) / scale
        if gap > 2 * tolerance:
            faults.append(f"token {num_equal + 1} differs, and the two logits are {gap:.2%} of the largest logit apart")
    note = f"{num_equal} of {len(reference.tokens)} greedy tokens equal, logits within {distance:.2%} of the largest"
    return note, faults


def read_answer(path: Path) -> AnswerTensors:
    """Read an answer that ``main`` of ``ask_model`` wrote."""
    with np.load(path) as arrays:
        return AnswerTensors(arrays["tokens"], arrays["logits"], arrays["prompt"], arrays.get("without_lora"))
