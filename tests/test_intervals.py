"""Bootstrap and paired test by image; metrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from babydoctor.eval import metrics
from babydoctor.eval.intervals import bootstrap, cluster_sums, paired_difference
from babydoctor.eval.metrics import mean_figure


def test_cluster_sums_by_hand() -> None:
    figure = mean_figure("score", [1.0, 0.0, None, 1.0])
    assert cluster_sums(figure.columns, ["a", "b", "b", "a"]).tolist() == [[2.0, 2.0], [0.0, 1.0]]


def test_interval_is_wider_by_image_than_by_question() -> None:
    # Ten images with ten equal answers each are ten independent facts, not a hundred.
    scores = [float(image < 5) for image in range(10) for _ in range(10)]
    by_image = bootstrap(mean_figure("score", scores), [place // 10 for place in range(100)])
    by_question = bootstrap(mean_figure("score", scores), list(range(100)))
    assert by_image.value == by_question.value == 0.5
    assert by_image.high - by_image.low > 2 * (by_question.high - by_question.low)
    assert (by_image.num_questions, by_image.num_clusters) == (100, 10)


def test_interval_width_agrees_with_the_binomial() -> None:
    scores = [float(place % 2) for place in range(400)]
    interval = bootstrap(mean_figure("score", scores), list(range(400)))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 400), rel=0.1)


def test_interval_of_one_image_is_unknown_and_json_has_no_nan() -> None:
    interval = bootstrap(mean_figure("score", [1.0, 0.0]), ["a", "a"])
    assert math.isnan(interval.low)
    assert interval.to_json()["low"] is None


def test_same_seed_same_interval() -> None:
    figure = mean_figure("score", [1.0, 0.0, 1.0, 1.0, 0.0])
    assert bootstrap(figure, range(5), seed=3) == bootstrap(figure, range(5), seed=3)


def test_paired_test_of_equal_answers_finds_no_difference() -> None:
    figure = mean_figure("score", [1.0, 0.0, 1.0, 0.0])
    difference = paired_difference(figure, figure, list(range(4)))
    assert (difference.value, difference.p_value) == (0.0, 1.0)


def test_paired_test_by_hand() -> None:
    # B is right where A is wrong on 5 images: of the 2^5 swaps only "none" and "all" are as extreme, p = 2/32.
    a, b = mean_figure("score", [0.0] * 5), mean_figure("score", [1.0] * 5)
    difference = paired_difference(a, b, list(range(5)), num_resamples=20_000)
    assert difference.value == 1.0
    assert difference.p_value == pytest.approx(2 / 32, abs=0.01)


def test_paired_test_finds_a_clear_difference() -> None:
    generator = np.random.default_rng(0)
    a = mean_figure("score", generator.binomial(1, 0.5, 300).astype(float).tolist())
    b = mean_figure("score", generator.binomial(1, 0.8, 300).astype(float).tolist())
    difference = paired_difference(a, b, list(range(300)))
    assert difference.p_value < 0.01
    assert difference.low > 0


def test_calibration_error_by_hand() -> None:
    # Bin (0.9, 1.0]: two answers at 0.95, one right: |0.95 - 0.5|. Bin (0.5, 0.6]: two at 0.6, both right: |0.6 - 1|.
    confidences, correct = [0.95, 0.95, 0.6, 0.6], [1.0, 0.0, 1.0, 1.0]
    assert metrics.expected_calibration_error(confidences, correct) == pytest.approx(0.5 * 0.45 + 0.5 * 0.4)
    bins = metrics.reliability_bins(confidences, correct)
    assert [entry["count"] for entry in bins] == [2, 2]
    assert math.isnan(metrics.expected_calibration_error([], []))


def test_abstention_by_hand() -> None:
    # Of 20 answers, the 5 least certain are wrong, so all remaining ones are right after abstaining on 25%.
    confidences = [1 - place / 40 for place in range(20)]
    curve = metrics.abstention_curve(confidences, [1.0] * 15 + [0.0] * 5)
    by_share = {entry["abstain"]: entry for entry in curve}
    assert by_share[0.0]["accuracy"] == pytest.approx(15 / 20)
    assert by_share[0.25] == {"abstain": 0.25, "num_left": 15, "accuracy": 1.0}
    assert by_share[0.95]["num_left"] == 1


def test_yes_no_confidence_compares_yes_with_no() -> None:
    first_token = {" Yes": 0.5, "yes": 0.1, " No": 0.2, " left": 0.2}
    assert metrics.yes_no_confidence(first_token, "Yes.") == pytest.approx(0.6 / 0.8)
    assert metrics.yes_no_confidence(first_token, "no") == pytest.approx(0.2 / 0.8)
    assert metrics.yes_no_confidence(first_token, "left") is None
    assert metrics.yes_no_confidence({" left": 1.0}, "yes") is None
    # A vocabulary without "Yes": "Y" begins it, and "No" is not the only candidate.
    assert metrics.yes_no_confidence({"Y": 0.3, "No": 0.1, "left": 0.6}, "Yes") == pytest.approx(0.75)
    assert metrics.yes_no_confidence({"No": 0.1}, "Yes") is None
