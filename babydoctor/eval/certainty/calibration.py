"""Calibration of answer probabilities by a temperature, and how often similar answers were right. Numbers only.

The probability of an answer is the product of the probabilities of its tokens, each from the softmax of its logits
divided by a temperature. The temperature minimizes the negative log-likelihood of "right" and "wrong" on held-out
answers (temperature scaling, Guo et al., ICML 2017).

Only the likeliest ``NUM_TOP`` tokens are known of each softmax. The probability of all other tokens is taken as spread
evenly. Calibration and serving do the same, so the figures hold for what is served.

Shapes: ``N`` answers, ``A`` tokens of an answer, ``K`` known tokens of a softmax, ``G`` temperatures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from babydoctor.engine.request import TokenLogprob

NUM_TOP = 8
"""Alternatives of each token. Each costs time to spell on the engine's thread."""

NUM_BINS = 10
"""Bins with equally many answers, of which the web UI quotes one."""

TEMPERATURES = np.geomspace(0.05, 20, 241)

_SMALLEST = 1e-12


def answer_log_probability(
    tokens: Sequence[TokenLogprob], vocab_size: int, temperatures: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Log-probability of an answer at each temperature, float64 ``[G]``.

    Args:
        tokens: its tokens with the alternatives for each, at temperature 1.
    """
    sharpness = 1 / np.asarray(temperatures, float)  # [G]
    total = np.zeros(len(sharpness))
    for token in tokens:
        known = [value for id, _, value in token.top if id != token.token_id]
        values = np.array([token.logprob, *known])  # [K]
        scaled = values * sharpness[:, None]  # [G, K]
        if (num_other := vocab_size - len(values)) > 0:
            other = np.log(max(_SMALLEST, 1 - np.exp(values).sum()) / num_other)
            scaled = np.column_stack([scaled, other * sharpness + np.log(num_other)])  # [G, K + 1]
        total += scaled[:, 0] - np.logaddexp.reduce(scaled, axis=1)
    return np.minimum(total, 0.0)  # rounding may lift a probability of 1 above it


def fit_temperature(log_probabilities: np.ndarray, right: np.ndarray) -> int:
    """Index of the temperature with the smallest negative log-likelihood.

    Args:
        log_probabilities: of each answer at each temperature, ``[N, G]``.
        right: 1.0 for a right answer, 0.0 for a wrong one, ``[N]``.
    """
    log_p = np.minimum(log_probabilities, -_SMALLEST)
    log_wrong = np.log(-np.expm1(log_p))
    is_right = np.asarray(right, bool)[:, None]
    return int(np.where(is_right, log_p, log_wrong).mean(axis=0).argmax())


def equal_count_bins(
    confidences: np.ndarray, right: np.ndarray, num_bins: int = NUM_BINS
) -> list[dict[str, float | int]]:
    """Bins with about equally many answers, from the least confident to the most: bounds, count, number right.

    The bounds cover 0 to 1. Answers with the same confidence are in one bin.
    """
    order = np.argsort(confidences, kind="stable")
    values, hits = np.asarray(confidences, float)[order], np.asarray(right, float)[order]
    starts = sorted({int(np.searchsorted(values, part[0])) for part in np.array_split(values, num_bins) if len(part)})
    bins: list[dict[str, float | int]] = []
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(values)
        low = float(values[start - 1] + values[start]) / 2 if number else 0.0
        if bins:
            bins[-1]["high"] = low
        bins.append({"low": low, "high": 1.0, "count": end - start, "num_right": int(hits[start:end].sum())})
    return bins


def explain_confidence(figures: Mapping[str, Any], tokens: Sequence[TokenLogprob], vocab_size: int) -> dict[str, Any]:
    """The confidence of one answer and how often similar answers were right, or the reason why there is none.

    Args:
        figures: ``confidence`` of the manifest.
        tokens: the tokens of the answer with ``NUM_TOP`` alternatives each.
    """
    longest = int(figures["max_tokens"])
    if len(tokens) > longest:
        reason = f"The answer has {len(tokens)} tokens. Confidence was calibrated on answers of up to {longest}."
        return {"unavailable": reason}
    value = float(np.exp(answer_log_probability(tokens, vocab_size, [figures["temperature"]])[0]))
    similar = next((entry for entry in figures["bins"] if value <= entry["high"]), figures["bins"][-1])
    return {
        "value": value,
        "num_similar": similar["count"],
        "num_similar_right": similar["num_right"],
        "measured_on": figures["task"],
    }


def split_by_group(groups: Sequence[str], seed: int) -> np.ndarray:
    """A random half of the groups: bool ``[N]``, true for members of the first half."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    first = {names[index] for index in order[: len(names) // 2]}
    return np.array([group in first for group in groups])
