"""Scores of answers against references, and calibration of confidences. Pure functions of text and numbers.

Every figure is a function of sums over questions (``Figure``). Questions are scored once, and the bootstrap only
reweights the sums (see ``intervals.py``).

Shapes: ``N`` questions, ``K`` columns that are summed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

YES, NO = "yes", "no"

NUM_BINS = 10
"""Bins of the calibration figures."""

_NUMBERS = "zero one two three four five six seven eight nine ten"
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_NUMBERS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am mightn't might've mustn't must've needn't o'clock oughtn't shan't should've shouldn't somebody'll
    somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
    they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# The published table maps each contraction without its apostrophe to the right spelling.
_CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


@lru_cache(maxsize=2**16)  # a test repeats its references, and models repeat their answers
def normalize(text: str) -> str:
    """Normalize an answer as the VQA evaluation does, and LLaVA-Med's and VQA-Med's after it.

    Converts to lower case, removes punctuation (or replaces it by a space between two words), converts number words up
    to ten to digits, removes articles, and adds missing apostrophes to contractions.

    Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and its evaluation code.
    """
    text = text.strip().replace("\n", " ").replace("\t", " ")
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        # The published rule: a mark next to a space anywhere is deleted everywhere.
        at_word_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_word_edge or drop_all else " ")
    result = _FULL_STOP.sub("", result)
    words = (_NUMBER_WORDS.get(word, word) for word in result.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def parse_yes_no(answer: str) -> str | None:
    """Parse an answer as "yes" or "no". None if it is neither, or both ("yes no").

    The first word decides ("Yes, there is a fracture."), and the other word must not follow.
    """
    words = normalize(answer).split()
    if not words or words[0] not in (YES, NO):
        return None
    return None if (NO if words[0] == YES else YES) in words else words[0]


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalized answer equals one of the normalized references, else 0.0."""
    return float(normalize(answer) in {normalize(reference) for reference in references})


def token_overlap(answer: str, reference: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the normalized words. A repeated word matches as often as it is in both texts.

    Source: the SQuAD evaluation (Rajpurkar et al., 2016) with VQA's normalization.
    """
    answer_words, reference_words = normalize(answer).split(), normalize(reference).split()
    if not answer_words or not reference_words:
        equal = float(answer_words == reference_words)
        return equal, equal, equal
    num_shared = sum((Counter(answer_words) & Counter(reference_words)).values())
    if num_shared == 0:
        return 0.0, 0.0, 0.0
    precision, recall = num_shared / len(answer_words), num_shared / len(reference_words)
    return precision, recall, 2 * precision * recall / (precision + recall)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Best token F1 over the references."""
    return max(token_overlap(answer, reference)[2] for reference in references)


def token_recall(answer: str, references: Sequence[str]) -> float:
    """Best token recall over the references. Long answers score high; compare with F1."""
    return max(token_overlap(answer, reference)[1] for reference in references)


@dataclass(frozen=True, slots=True, eq=False)
class Figure:
    """A score over questions: ``value = combine(columns.sum(axis=0))``.

    ``columns`` is ``[N, K]``. ``combine`` maps sums of shape ``[..., K]`` to ``[...]``. It returns NaN, and does not
    raise, if the figure is undefined for the sums, as in a resample without any question of its kind.
    """

    name: str
    columns: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        return float(self.combine(self.columns.sum(axis=0)))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise division; NaN where the denominator is 0. Shapes ``[...]``."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


def mean_figure(name: str, scores: Sequence[float | None]) -> Figure:
    """The mean of the scores. None marks a question that does not count."""
    columns = np.array([(0.0, 0.0) if score is None else (score, 1.0) for score in scores], float).reshape(-1, 2)
    return Figure(name, columns, lambda sums: ratio(sums[..., 0], sums[..., 1]))


def yes_no_figures(answers: Sequence[str], references: Sequence[str]) -> list[Figure]:
    """Figures over yes/no questions. ``references`` are "yes" or "no", or "" for other questions.

    - ``yes_no_accuracy``: the parsed answer equals the reference. An unparseable answer is wrong.
    - ``yes_no_balanced_accuracy``: mean recall of "yes" and "no". Any constant answer scores 0.5.
    - ``yes_f1``, ``no_f1``, ``yes_no_f1`` (their mean).
    - ``unparseable_rate``: share of answers that are neither yes nor no, or both.
    """
    columns = np.zeros((len(answers), 6))
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        if reference not in (YES, NO):
            continue
        given = parse_yes_no(answer)
        columns[row, (YES, NO, None).index(given) + (0 if reference == YES else 3)] = 1.0

    def accuracy(sums: np.ndarray) -> np.ndarray:
        return ratio(sums[..., 0] + sums[..., 4], sums.sum(axis=-1))

    def balanced(sums: np.ndarray) -> np.ndarray:
        recall_yes = ratio(sums[..., 0], sums[..., :3].sum(axis=-1))
        recall_no = ratio(sums[..., 4], sums[..., 3:].sum(axis=-1))
        return (recall_yes + recall_no) / 2

    def f1_yes(sums: np.ndarray) -> np.ndarray:
        return ratio(2 * sums[..., 0], sums[..., :3].sum(axis=-1) + sums[..., 0] + sums[..., 3])

    def f1_no(sums: np.ndarray) -> np.ndarray:
        return ratio(2 * sums[..., 4], sums[..., 3:].sum(axis=-1) + sums[..., 1] + sums[..., 4])

    return [
        Figure("yes_no_accuracy", columns, accuracy),
        Figure("yes_no_balanced_accuracy", columns, balanced),
        Figure("yes_f1", columns, f1_yes),
        Figure("no_f1", columns, f1_no),
        Figure("yes_no_f1", columns, lambda sums: (f1_yes(sums) + f1_no(sums)) / 2),
        Figure("unparseable_rate", columns, lambda sums: ratio(sums[..., 2] + sums[..., 5], sums.sum(axis=-1))),
    ]


def most_frequent(answers: Sequence[str]) -> str:
    """The most frequent normalized answer. Ties go to the alphabetically first."""
    counts = Counter(normalize(answer) for answer in answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def repetition(answers: Sequence[str], num_shown: int = 10) -> dict[str, object]:
    """Repetition: the share of distinct normalized answers, and the most frequent ones with their share."""
    counts = Counter(normalize(answer) for answer in answers)
    total = max(len(answers), 1)
    return {
        "num_answers": len(answers),
        "num_distinct": len(counts),
        "distinct_share": len(counts) / total,
        "empty_share": counts.get("", 0) / total,
        "most_repeated": [
            {"answer": answer, "count": count, "share": count / total}
            for answer, count in counts.most_common(num_shown)
        ],
    }


def reliability_bins(
    confidences: Sequence[float], correct: Sequence[float], num_bins: int = NUM_BINS
) -> list[dict[str, float | int]]:
    """Equal-width bins of confidence: bounds, count, mean confidence and accuracy. Empty bins are left out.

    ``confidences`` are in [0, 1], ``correct`` is 0.0 or 1.0; both ``[N]``. A confidence on a bound belongs to the lower
    bin, and 0 to the first bin.
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


def auroc(negatives: np.ndarray, positives: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a positive is larger than a negative; ties count as half.

    Args:
        negatives, positives: ``[N]`` and ``[P]``, neither empty.
    """
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, "left") + np.searchsorted(ordered, positives, "right")
    return float(below.mean() / 2 / len(negatives))


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
