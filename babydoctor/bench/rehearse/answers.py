"""Answers of one model by different roads, and how near they are. No torch: the rehearsal's own process stays small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class AnswerTensors:
    """``tokens`` ``[N]`` are the model's own greedy choice; ``logits`` ``[N, V]`` are at the reference's tokens.

    ``prompt`` ``[T]`` are the ids of the prompt's text, without image slots. ``without_lora`` ``[N, V]`` are the
    logits with the run's adapter switched off, None where there is none.
    """

    tokens: np.ndarray
    logits: np.ndarray
    prompt: np.ndarray
    without_lora: np.ndarray | None = None


def differences(reference: AnswerTensors, other: AnswerTensors, tolerance: float) -> tuple[str, list[str]]:
    """A sentence that says how near two roads are, and what is wrong.

    Greedy tokens must be equal. Where they part, the two candidates must be so near in the reference that rounding
    decides; the tokens behind that answer different texts and are not compared.
    """
    vocab_size = reference.logits.shape[1]
    scale = float(np.abs(reference.logits).max())
    distance = float(np.abs(reference.logits - other.logits[:, :vocab_size]).max()) / scale
    faults = []
    if not np.array_equal(reference.prompt, other.prompt):
        faults.append("the prompt has other tokens")
    if distance > tolerance:
        faults.append(f"logits differ by {distance:.2%} of the largest, allowed are {tolerance:.0%}")
    apart = np.flatnonzero(reference.tokens != other.tokens)
    num_equal = int(apart[0]) if len(apart) else len(reference.tokens)
    if len(apart):
        row = reference.logits[num_equal]
        gap = float(row[reference.tokens[num_equal]] - row[other.tokens[num_equal]]) / scale
        if gap > 2 * tolerance:
            faults.append(f"token {num_equal + 1} is another one, and {gap:.2%} of the largest logit lie between them")
    told = f"{num_equal} of {len(reference.tokens)} greedy tokens equal, logits within {distance:.2%} of the largest"
    return told, faults


def read_answer(path: Path) -> AnswerTensors:
    """Read what ``main`` wrote."""
    with np.load(path) as arrays:
        return AnswerTensors(arrays["tokens"], arrays["logits"], arrays["prompt"], arrays.get("without_lora"))
