"""Scores of captions, with one reference each. BLEU and ROUGE come from libraries, CIDEr-D is implemented here.

pycocoevalcap, the usual implementation of CIDEr, was last released in 2020 and ships 100 MB of Java. On the same tokens
the results agree up to rounding (``tests/test_captions.py`` compares them if it is installed). The tokenizers differ:
sacrebleu's 13a here, Stanford's there.

METEOR needs NLTK's WordNet data and BERTScore needs a language model. Both are optional, and the error says what is
missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from babydoctor.eval.metrics import Figure, mean_figure, ratio
from babydoctor.eval.published import imageclef_rouge1, imageclef_text
from babydoctor.schema import UserError

MAX_ORDER = 4
CIDER_SIGMA = 6.0
BERT_SCORE_MODEL = "microsoft/deberta-xlarge-mnli"
OPTIONAL_METRICS = ("meteor", "bertscore")


def caption_figures(answers: Sequence[str], references: Sequence[str]) -> list[Figure]:
    """BLEU-1..4 (corpus), ROUGE-L, CIDEr-D, the share of empty answers, and ImageCLEF's ROUGE-1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge_l = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return [
        *bleu_figures(answers, references),
        mean_figure("rouge_l", rouge_l),
        mean_figure("cider", cider_scores(answers, references)),
        mean_figure("empty_rate", [float(not answer.strip()) for answer in answers]),
        mean_figure("imageclef_rouge1", [imageclef_rouge1(a, r) for a, r in zip(answers, references, strict=True)]),
    ]


def bleu_figures(answers: Sequence[str], references: Sequence[str]) -> list[Figure]:
    """Corpus BLEU-1..4 in [0, 1]: lower case, 13a tokens, no smoothing. ``Figure`` sums sacrebleu's counts.

    The columns are sacrebleu's statistics of one sentence: answer length, reference length, four counts of matching
    n-grams, four counts of n-grams.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(lowercase=True, tokenize="13a", smooth_method="none", effective_order=False)
    # Only this private method returns counts per sentence, which the bootstrap needs.
    columns = np.array(bleu._extract_corpus_statistics(list(answers), [list(references)]), float)
    columns = columns.reshape(len(answers), 2 + 2 * MAX_ORDER)

    def combine(sums: np.ndarray, order: int) -> np.ndarray:
        hits = sums[..., 2 : 2 + order]
        totals = sums[..., 2 + MAX_ORDER : 2 + MAX_ORDER + order]
        precisions = ratio(hits, totals)
        with np.errstate(divide="ignore"):
            # Answers too short for this order have no n-gram, which counts as no match.
            logs = np.log(np.where(np.isnan(precisions), 0.0, precisions)).mean(axis=-1)
        brevity = np.minimum(0.0, 1.0 - ratio(sums[..., 1], sums[..., 0]))
        return np.where(sums[..., 0] == 0, 0.0, np.exp(logs + np.nan_to_num(brevity)))

    def bleu_of_order(order: int) -> Figure:
        return Figure(f"bleu_{order}", columns, lambda sums: combine(sums, order))

    return [bleu_of_order(order) for order in range(1, MAX_ORDER + 1)]


def cider_scores(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """CIDEr-D of each answer, on the scale of the published figures (times 10).

    Document frequencies come from the given references, so scores of different test sets are not comparable.

    Source: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    answer_grams = [_all_ngrams(tokenize(text.lower()).split()) for text in answers]
    reference_grams = [_all_ngrams(tokenize(text.lower()).split()) for text in references]
    document_frequency = Counter(gram for grams in reference_grams for gram in grams)
    log_documents = math.log(max(len(references), 1))

    def vectors(grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """TF-IDF vectors of the four orders, their norms, and the length in bigrams, which CIDEr-D compares."""
        by_order: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
        for gram, count in grams.items():
            idf = log_documents - math.log(max(1.0, document_frequency[gram]))
            by_order[len(gram) - 1][gram] = count * idf
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in by_order]
        return by_order, norms, sum(count for gram, count in grams.items() if len(gram) == 2)

    scores = []
    for answer, reference in zip(answer_grams, reference_grams, strict=True):
        answer_vectors, answer_norms, answer_length = vectors(answer)
        reference_vectors, reference_norms, reference_length = vectors(reference)
        length_penalty = math.exp(-((answer_length - reference_length) ** 2) / (2 * CIDER_SIGMA**2))
        total = 0.0
        for order in range(MAX_ORDER):
            product = sum(
                min(value, reference_vectors[order].get(gram, 0.0)) * reference_vectors[order].get(gram, 0.0)
                for gram, value in answer_vectors[order].items()
            )
            norm = answer_norms[order] * reference_norms[order]
            total += length_penalty * (product / norm if norm else product)
        scores.append(10 * total / MAX_ORDER)
    return scores


def _all_ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )


def optional_figure(name: str, answers: Sequence[str], references: Sequence[str]) -> Figure:
    """A caption metric that needs extra data or weights: "meteor" or "bertscore".

    Raises:
        UserError: the metric is unknown, or its data or weights are missing.
    """
    if name == "meteor":
        return mean_figure("meteor", _meteor_scores(answers, references))
    if name == "bertscore":
        return mean_figure("imageclef_bertscore", _bert_scores(answers, references))
    raise UserError(f"--metric {name}: no such metric; optional metrics are {', '.join(OPTIONAL_METRICS)}")


def _meteor_scores(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    from nltk.translate.meteor_score import single_meteor_score

    try:
        return [
            single_meteor_score(reference.lower().split(), answer.lower().split())
            for answer, reference in zip(answers, references, strict=True)
        ]
    except LookupError as error:
        raise UserError(
            "--metric meteor: NLTK's WordNet data is not on this machine. Get it once with "
            "`python -m nltk.downloader wordnet omw-1.4`, or leave the metric out"
        ) from error


def _bert_scores(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """BERTScore F with idf weights from the references, on ImageCLEF's preprocessed texts."""
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise UserError("--metric bertscore: the package is missing. Get it with `pip install bert-score`") from error
    texts = [imageclef_text(reference) for reference in references]
    try:
        scorer = BERTScorer(model_type=BERT_SCORE_MODEL, idf=True, idf_sents=texts)
    except OSError as error:
        raise UserError(
            f"--metric bertscore: the model {BERT_SCORE_MODEL} is not in the local cache and the hub cannot be "
            f"reached. Get it once with `hf download {BERT_SCORE_MODEL}`, or leave the metric out"
        ) from error
    scores = scorer.score([imageclef_text(answer) for answer in answers], texts)[2]
    return [float(score) for score in scores]
