"""Scores by the definitions of published papers, under their own names, for comparison with those papers.

They keep the flaws of the originals and are never a headline figure: constant answers can score high, as
``tests/test_metrics.py`` shows. Pure functions of text.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from babydoctor.eval.metrics import NO, YES, exact_match, normalize

# Snowball's English stop words from NLTK, without those with an apostrophe: punctuation is removed before comparing.
_STOP_WORD_LIST = """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it
    its itself they them their theirs themselves what which who whom this that these those am is are was were be been
    being have has had having do does did doing a an the and but if or because as until while of at by for with about
    against between into through during before after above below to from up down in out on off over under again
    further then once here there when where why how all any both each few more most other some such no nor not only
    own same so than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn
    haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
"""
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")


def llava_med_closed(answer: str, reference: str) -> float:
    """LLaVA-Med's hit for a closed question: the reference is a substring of an answer that contains "yes" or "no".

    "yes no" therefore hits every yes/no question, and "the image appears normal" hits every "no" ("normal").

    Source: microsoft/LLaVA-Med v1.0, ``llava/eval/run_eval.py``, as the paper's figures are computed.
    """
    answer, reference = normalize(answer.lower()), normalize(reference.lower())
    return float((YES in answer or NO in answer) and reference in answer)


def llava_med_pathvqa_closed(answer: str, reference: str) -> float | None:
    """The same in LLaVA-Med's PathVQA script, which leaves out wrong yes/no answers (None).

    Source: microsoft/LLaVA-Med v1.0, ``llava/eval/run_eval_pvqa.py``.
    """
    answer, reference = normalize(answer.lower()), normalize(reference.lower())
    if YES in answer or NO in answer:
        return 1.0 if reference in answer else None
    return 0.0


def llava_med_open_recall(answer: str, reference: str) -> float:
    """LLaVA-Med's recall for an open question: hits are counted in the answer, misses in the reference.

    A word that the answer repeats counts each time.

    Source: microsoft/LLaVA-Med v1.0, ``llava/eval/eval_metrics/evaluate_metrics.py``, ``calculate_f1score``.
    """
    answer_words = Counter(normalize(answer.lower()).split())
    reference_words = Counter(normalize(reference.lower()).split())
    num_hit = sum(count for word, count in answer_words.items() if word in reference_words)
    num_missed = sum(count for word, count in reference_words.items() if word not in answer_words)
    return num_hit / (num_hit + num_missed) if num_hit else 0.0


def vqa_med_accuracy(answer: str, references: Sequence[str]) -> float:
    """ImageCLEF VQA-Med's accuracy: equality with one of the alternatives after VQA's normalization.

    Source: evaluators of abachaa/VQA-Med-2020 and VQA-Med-2021.
    """
    return exact_match(answer, references)


def vqa_med_bleu(answer: str, references: Sequence[str]) -> float:
    """ImageCLEF VQA-Med's BLEU: best sentence BLEU over the alternatives, on stemmed words without stop words.

    NLTK 3.3 changed its unsmoothed sentence BLEU: since then an answer of fewer than four words scores nearly 0 even if
    it is correct. The published figures (BLEU above accuracy) use the older rule, which leaves orders without a match
    out of the product. This function does the same.

    Source: Ben Abacha et al., CLEF 2019-2021 working notes; abachaa/VQA-Med-2020, ``Evaluator-VQA-Med-2020.py``.
    """
    return max(_sentence_bleu(_stems(answer), _stems(reference)) for reference in references)


@lru_cache(maxsize=2**16)
def _stems(text: str) -> tuple[str, ...]:
    """Stems of the words that are no stop words."""
    from nltk.stem.snowball import SnowballStemmer

    stemmer = SnowballStemmer("english")
    plain = text.lower().translate(_WITHOUT_PUNCTUATION).split()
    return tuple(stemmer.stem(word) for word in plain if word not in _STOP_WORDS)


def _sentence_bleu(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Sentence BLEU-4 that stops at the first order without a match; each order has weight 1/4 (NLTK < 3.3)."""
    if not answer or not reference:
        return float(answer == reference)
    log_precision = 0.0
    for order in range(1, 5):
        answer_grams, reference_grams = _ngrams(answer, order), _ngrams(reference, order)
        num_hit = sum((answer_grams & reference_grams).values())
        if num_hit == 0:
            if order == 1:
                return 0.0
            break
        log_precision += 0.25 * math.log(num_hit / sum(answer_grams.values()))
    brevity = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    return brevity * math.exp(log_precision)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))


def imageclef_text(caption: str) -> str:
    """ImageCLEF caption's preprocessing: lower case, digit runs become "number", punctuation is removed.

    Source: the evaluation code of ImageCLEFmedical Caption 2023-2026.
    """
    return _NUMBER.sub("number", caption.lower()).translate(_WITHOUT_PUNCTUATION)


def imageclef_rouge1(answer: str, reference: str) -> float:
    """ImageCLEF caption's ROUGE-1 F without stemming, on the preprocessed texts. 1.0 if both are empty."""
    from rouge_score.rouge_scorer import RougeScorer

    if not answer and not reference:
        return 1.0
    score = RougeScorer(["rouge1"], use_stemmer=False).score(imageclef_text(reference), imageclef_text(answer))
    return float(score["rouge1"].fmeasure)
