"""Agreement of several sampled answers to one question, by normalized text. Text only.

Answers that differ in meaning every time are probably made up (Farquhar et al. 2024, "Detecting hallucinations in large
language models using semantic entropy"). Here answers mean the same if their normalized texts are equal. Otherwise
the share of common words measures how similar they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from babydoctor.eval.metrics import normalize, token_overlap

NUM_SAMPLES = 5
MAX_SAMPLES = 8

TEMPERATURE = 1.0
"""At this temperature, answers are drawn by the model's own probabilities."""

MIN_P = 0.05
"""Tokens below this share of the likeliest token are not drawn: many unlikely ones add up in a small model."""


def measure_agreement(answer: str, samples: Sequence[str]) -> dict[str, Any]:
    """Count the samples that mean the same as the answer.

    Returns:
        ``num_samples``, ``num_agreeing``, ``word_overlap`` (mean F1 of the words, 0 to 1), and ``groups``: each
        distinct text as first given, with its count, the most frequent one first.
    """
    given = normalize(answer)
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for sample in samples:
        key = normalize(sample)
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, sample.strip())
    groups = sorted(counts, key=lambda key: -counts[key])
    overlaps = [token_overlap(sample, answer)[2] for sample in samples]
    return {
        "num_samples": len(samples),
        "num_agreeing": counts.get(given, 0),
        "word_overlap": sum(overlaps) / max(1, len(overlaps)),
        "groups": [{"text": first[key], "count": counts[key]} for key in groups],
    }
