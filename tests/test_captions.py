"""Caption metrics, compared with cases computed by hand and with the original libraries."""

from __future__ import annotations

import math
import os

import pytest

from babydoctor.eval import captions
from babydoctor.schema import UserError


def _values(answers: list[str], references: list[str]) -> dict[str, float]:
    return {figure.name: figure.value for figure in captions.caption_figures(answers, references)}


def test_bleu_by_hand() -> None:
    # a b c d e | a b x d e: unigrams 4/5, bigrams 2/4 (ab, de), no trigram.
    values = _values(["a b c d e"], ["a b x d e"])
    assert values["bleu_1"] == pytest.approx(4 / 5)
    assert values["bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4))
    assert values["bleu_3"] == values["bleu_4"] == 0.0


def test_the_brevity_penalty_of_bleu_uses_the_whole_corpus() -> None:
    # 3 of 3 words right, references of 2 + 4 words: brevity exp(1 - 6/3).
    values = _values(["a b", "c"], ["a b", "c d e f"])
    assert values["bleu_1"] == pytest.approx(math.exp(1 - 6 / 3))


def test_bleu_equals_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU

    answers = ["Chest radiograph shows a nodule.", "Axial CT of the abdomen, no mass", "MRI"]
    references = ["Chest radiograph with a nodule.", "Axial CT of the abdomen shows a mass", "MRI of the brain"]
    values = _values(answers, references)
    for order in range(1, 5):
        bleu = BLEU(lowercase=True, smooth_method="none", max_ngram_order=order)
        assert values[f"bleu_{order}"] == pytest.approx(bleu.corpus_score(answers, [references]).score / 100)


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "a c" of 3 and 4 words: P 2/3, R 2/4, F = 2 * 2 / 7.
    assert _values(["a b c"], ["a x c y"])["rouge_l"] == pytest.approx(4 / 7)


def test_cider_by_hand() -> None:
    # Two references without a shared n-gram: idf of each is log 2. The first answer is its reference: each of the
    # four orders gives cosine 1, so 10. The second shares nothing: 0.
    assert captions.cider_scores(["a b c d", "x"], ["a b c d", "e f g h"]) == [pytest.approx(10.0), 0.0]
    # Half the words in order: unigrams cos = 2 / (sqrt 2 * sqrt 4); bigrams 1 / (1 * sqrt 3); higher orders 0.
    # Length penalty: 1 bigram against 3: exp(-(2^2) / (2 * 36)).
    expected = 10 / 4 * (2 / math.sqrt(8) + 1 / math.sqrt(3)) * math.exp(-4 / 72)
    assert captions.cider_scores(["a b", "e f g h"], ["a b c d", "e f g h"])[0] == pytest.approx(expected)


def test_cider_equals_pycocoevalcap() -> None:
    scorer_module = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    references = ["a chest radiograph with a nodule", "axial ct of the abdomen", "mri of the brain with a mass"]
    answers = ["a chest radiograph", "axial ct of the chest with a nodule", "mri mri of the brain with a mass"]
    scorer = scorer_module.CiderScorer(n=4, sigma=6.0)
    for answer, reference in zip(answers, references, strict=True):
        scorer += (answer, [reference])
    assert captions.cider_scores(answers, references) == pytest.approx(scorer.compute_score()[1])


def test_cider_of_one_document_is_zero() -> None:
    # With a single reference every n-gram is in every document, so all weights are 0.
    assert captions.cider_scores(["a b"], ["a b"]) == [0.0]


def test_empty_answers_score_zero_and_are_counted() -> None:
    values = _values(["", "a b c d"], ["a b c d", "e f g h"])
    assert values["empty_rate"] == 0.5
    assert values["bleu_1"] == 0.0


@pytest.mark.skipif(bool(os.environ.get("NLTK_DATA")), reason="WordNet may be there")
def test_meteor_names_the_missing_program() -> None:
    try:
        captions.optional_figure("meteor", ["a lung"], ["a heart"])
    except UserError as error:
        assert "nltk.downloader" in str(error)


def test_an_unknown_caption_metric_is_refused() -> None:
    with pytest.raises(UserError, match="meteor, bertscore"):
        captions.optional_figure("spice", ["a"], ["b"])
