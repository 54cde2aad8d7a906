"""Calibration of confidences: reliability bins, calibration error and the abstention curve. Pure functions.

``confidences`` are in [0, 1], ``correct`` is 0.0 or 1.0; both ``[N]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from babydoctor.eval.metrics import NO, YES, normalize

NUM_BINS = 10


def reliability_bins(
    confidences: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS
) -> list[dict[str, float | int]]:
    """Equal-width bins of confidence: bounds, count, mean confidence and accuracy. Empty bins are left out.

    A confidence on a bound belongs to the lower bin, and 0 to the first bin.
    """
    confidence_array, correct_array = np.asarray(confidences, float), np.asarray(correct, float)
    assert confidence_array.shape == correct_array.shape, (confidence_array.shape, correct_array.shape)
    assert ((confidence_array >= 0) & (confidence_array <= 1)).all(), confidence_array
    index = np.clip(np.ceil(confidence_array * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins: list[dict[str, float | int]] = []
    for number in range(num_bins):
        inside = index == number
        if inside.any():
            bins.append(
                {
                    "low": number / num_bins,
                    "high": (number + 1) / num_bins,
                    "count": int(inside.sum()),
                    "confidence": float(confidence_array[inside].mean()),
                    "accuracy": float(correct_array[inside].mean()),
                }
            )
    return bins


def expected_calibration_error(
    confidences: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS
) -> float:
    """Mean distance between confidence and accuracy over the bins, weighted by count. NaN without answers.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017.
    """
    bins = reliability_bins(confidences, correct, num_bins)
    total = sum(int(entry["count"]) for entry in bins)
    if total == 0:
        return float("nan")
    return sum(entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins) / total


def abstention_curve(confidences: Sequence[float], correct: Sequence[float]) -> list[dict[str, float | int]]:
    """Accuracy of the remaining answers when the least confident k% are withheld, for k = 0, 5, ... 95.

    Ties keep the order of the questions. At least one answer always remains.
    """
    correct_array = np.asarray(correct, float)
    if len(correct_array) == 0:
        return []
    most_confident_first = np.argsort(-np.asarray(confidences, float), kind="stable")
    accuracy = np.cumsum(correct_array[most_confident_first]) / np.arange(1, len(correct_array) + 1)
    curve: list[dict[str, float | int]] = []
    for percent in range(0, 100, 5):
        num_left = max(1, round(len(correct_array) * (100 - percent) / 100))
        curve.append({"abstain": percent / 100, "num_left": num_left, "accuracy": float(accuracy[num_left - 1])})
    return curve


def yes_no_confidence(first_token_probabilities: Mapping[str, float], answer: str) -> float | None:
    """Confidence of a yes/no answer from the probabilities of the alternatives for its first token.

    The confidence is p(given) / (p(yes) + p(no)), summed over tokens in any case and with or without a leading space.
    A prefix of a word ("Y") counts as the word, because a small vocabulary may not have the whole word. None if the
    answer is neither yes nor no, or none of the alternatives matches it.
    """
    mass = {YES: 0.0, NO: 0.0}
    for token, probability in first_token_probabilities.items():
        piece = normalize(token)
        for word in mass:
            if piece and word.startswith(piece):
                mass[word] += probability
    given = normalize(answer).split()[:1]
    if not given or mass.get(given[0], 0.0) == 0:
        return None
    return mass[given[0]] / (mass[YES] + mass[NO])
