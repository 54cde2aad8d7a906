"""Every metric on cases that were computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from babydoctor.eval import published
from babydoctor.eval.metrics import (
    exact_match,
    mean_figure,
    most_frequent,
    normalize,
    parse_yes_no,
    repetition,
    token_f1,
    token_overlap,
    token_recall,
    yes_no_figures,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The LEFT lung ", "left lung"),
        ("two nodules", "2 nodules"),
        ("None", "0"),
        ("T1-weighted", "t1 weighted"),  # a mark between words becomes a space
        ("left, right", "left right"),  # a mark at a word's edge is removed
        ("1,000 mm", "1000 mm"),  # a comma inside a number is removed, like all other marks
        ("3.5 cm.", "3.5 cm"),  # a point inside a number is kept
        ("dont know", "don't know"),
        ("isnt", "isn't"),
        ("an axial\nCT", "axial ct"),
        ("", ""),
    ],
)
def test_normalize_follows_the_vqa_rules(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("Yes, there is a fracture", "yes"),
        ("yes no", None),
        ("No. Yes.", None),
        ("The image appears normal", None),
        ("not sure", None),
        ("", None),
    ],
)
def test_parse_yes_no(answer: str, expected: str | None) -> None:
    assert parse_yes_no(answer) == expected


def test_exact_match_accepts_any_alternative() -> None:
    assert exact_match("the left lung", ["right lung", "Left lung."]) == 1.0
    assert exact_match("left", ["left lung"]) == 0.0


def test_token_overlap_counts_repeated_words() -> None:
    # answer: left left lung (3 words), reference: left upper lung (3): shared are left once and lung once.
    assert token_overlap("left left lung", "left upper lung") == (2 / 3, 2 / 3, pytest.approx(2 / 3))
    # answer of 1 word, reference of 4: precision 1, recall 1/4, F1 = 2 * 1/4 / (5/4) = 0.4
    assert token_overlap("lung", "right lower lobe lung") == (1.0, 0.25, pytest.approx(0.4))
    assert token_overlap("heart", "lung") == (0.0, 0.0, 0.0)
    assert token_overlap("", "lung") == (0.0, 0.0, 0.0)
    assert token_f1("lung", ["heart", "left lung"]) == pytest.approx(2 / 3)
    assert token_recall("lung", ["heart", "left lung"]) == 0.5


def test_yes_no_figures_by_hand() -> None:
    references = ["yes", "yes", "yes", "no", "no", ""]
    answers = ["yes", "no", "it is unclear", "no", "yes", "left"]
    values = {figure.name: figure.value for figure in yes_no_figures(answers, references)}
    # yes: 1 right, 1 said no, 1 unparseable. no: 1 right, 1 said yes. The last question is not a yes/no question.
    assert values["yes_no_accuracy"] == pytest.approx(2 / 5)
    assert values["yes_no_balanced_accuracy"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert values["yes_f1"] == pytest.approx(2 * 1 / (3 + 2))  # 3 references, 2 answers
    assert values["no_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert values["yes_no_f1"] == pytest.approx((0.4 + 0.5) / 2)
    assert values["unparseable_rate"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("constant", ["yes", "no"])
def test_balanced_accuracy_of_a_constant_is_a_half(constant: str) -> None:
    references = ["yes"] * 9 + ["no"]
    figure = next(f for f in yes_no_figures([constant] * 10, references) if f.name == "yes_no_balanced_accuracy")
    assert figure.value == 0.5


def test_a_mean_ignores_none() -> None:
    assert mean_figure("score", [1.0, None, 0.0, 1.0]).value == pytest.approx(2 / 3)
    assert math.isnan(mean_figure("score", [None, None]).value)


def test_most_frequent_and_repetition() -> None:
    answers = ["No.", "no", "Yes", "left", ""]
    assert most_frequent(answers) == "no"
    found = repetition(answers)
    assert found["num_distinct"] == 4
    assert found["distinct_share"] == pytest.approx(4 / 5)
    assert found["empty_share"] == pytest.approx(1 / 5)
    assert found["most_repeated"][0] == {"answer": "no", "count": 2, "share": pytest.approx(0.4)}  # type: ignore[index]


# The published definitions, including their faults.


def test_llava_med_closed_is_a_substring_test() -> None:
    assert published.llava_med_closed("Yes, it is", "Yes") == 1.0
    assert published.llava_med_closed("yes no", "No") == 1.0
    assert published.llava_med_closed("The image appears normal", "No") == 1.0
    assert published.llava_med_closed("The image appears normal", "Yes") == 0.0
    assert published.llava_med_closed("left", "left") == 0.0  # neither yes nor no in it


def test_llava_med_pathvqa_omits_wrong_answers() -> None:
    assert published.llava_med_pathvqa_closed("yes", "yes") == 1.0
    assert published.llava_med_pathvqa_closed("yes", "no") is None
    assert published.llava_med_pathvqa_closed("left", "no") == 0.0


def test_llava_med_open_recall_counts_hits_in_the_answer() -> None:
    # lung is hit twice (the answer repeats it), upper is missed: 2 / (2 + 1), where a true recall is 1/2.
    assert published.llava_med_open_recall("lung lung", "upper lung") == pytest.approx(2 / 3)
    assert token_recall("lung lung", ["upper lung"]) == pytest.approx(1 / 2)
    assert published.llava_med_open_recall("", "lung") == 0.0


def test_vqa_med_bleu_by_hand() -> None:
    assert published.vqa_med_bleu("Meningioma", ["meningioma"]) == 1.0  # one word, so higher orders are left out
    assert published.vqa_med_bleu("The masses", ["mass"]) == 1.0  # stop word gone, stem equal
    assert published.vqa_med_bleu("heart", ["lung", "heart failure"]) == pytest.approx(math.exp(1 - 2 / 1))
    # left upper lung nodule | left lung nodule: unigrams 3/4, bigrams 1/3 (lung nodule), no trigram; longer: no penalty
    assert published.vqa_med_bleu("left upper lung nodule", ["left lung nodule"]) == pytest.approx(
        math.exp(0.25 * math.log(3 / 4) + 0.25 * math.log(1 / 3))
    )
    assert published.vqa_med_bleu("the", ["of"]) == 1.0  # both are empty after preprocessing
    assert published.vqa_med_bleu("heart", ["lung"]) == 0.0


def test_vqa_med_accuracy_takes_alternatives() -> None:
    assert published.vqa_med_accuracy("The Meningioma.", ["glioma", "meningioma"]) == 1.0


def test_imageclef_preprocessing_and_rouge1() -> None:
    assert published.imageclef_text("T2-weighted, 15 mm.") == "tnumberweighted number mm"
    # answer 3 words, reference 4 words, 2 shared: precision 2/3, recall 2/4, F = 2 * 2 / 7
    assert published.imageclef_rouge1("Chest CT 7", "chest ct of thorax") == pytest.approx(4 / 7)
    assert published.imageclef_rouge1("mass 15 mm", "mass 22 mm") == 1.0  # digits are all one word
    assert published.imageclef_rouge1("", "") == 1.0


@pytest.mark.parametrize("trap", ["yes no", "The image appears normal"])
def test_traps_score_under_the_published_name_only(trap: str) -> None:
    references = ["no"] * 5 + ["yes"] * 5
    hits = [published.llava_med_closed(trap, reference) for reference in references]
    assert np.mean(hits) >= 0.5
    assert all(exact_match(trap, [reference]) == 0.0 for reference in references)
    values = {figure.name: figure.value for figure in yes_no_figures([trap] * 10, references)}
    assert values["yes_no_accuracy"] == values["yes_no_balanced_accuracy"] == values["yes_no_f1"] == 0.0
    assert values["unparseable_rate"] == 1.0
