"""Uncertainty of figures: bootstrap intervals and paired tests, both by image. Pure functions.

Questions about the same image are not independent, because misreading it affects all of them. The bootstrap therefore
resamples images with all their questions (a cluster bootstrap). Where a task groups its images, such as by article, or
has rows without an image, groups or rows take the place of images.

Shapes: ``N`` questions, ``C`` clusters (images), ``R`` resamples, ``K`` columns of a figure.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from babydoctor.eval.metrics import Figure

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% bootstrap interval. ``low`` and ``high`` are NaN with fewer than two clusters."""

    value: float
    low: float
    high: float
    num_questions: int
    num_clusters: int
    """Images, or what is resampled in their place."""

    def to_json(self) -> dict[str, float | int | None]:
        return _without_nan(asdict(self))


@dataclass(frozen=True, slots=True)
class Difference:
    """Figure of B minus figure of A on the same questions, its 95% interval and the p-value of "no difference"."""

    value: float
    low: float
    high: float
    p_value: float

    def to_json(self) -> dict[str, float | int | None]:
        return _without_nan(asdict(self))


def _without_nan(values: Mapping[str, float | int]) -> dict[str, float | int | None]:
    """None in place of NaN, which JSON does not have."""
    return {key: None if value != value else value for key, value in values.items()}


def cluster_indices(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Number the clusters in order of appearance. Returns indices ``[N]`` and the number of clusters ``C``."""
    numbers: dict[Hashable, int] = {}
    indices = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
    return indices, len(numbers)


def cluster_sums(columns: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Sum the columns ``[N, K]`` over the questions of each image: ``[C, K]``."""
    assert len(columns) == len(clusters), (len(columns), len(clusters))
    indices, num_clusters = cluster_indices(clusters)
    sums = np.zeros((num_clusters, columns.shape[1]))
    np.add.at(sums, indices, columns)
    return sums


def draw_weights(num_clusters: int, num_resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each resample: ``[R, C]``. Every row sums to ``C``."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples)


def bootstrap(
    figure: Figure, clusters: Sequence[Hashable], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Interval:
    """The figure with its 95% percentile bootstrap interval over images.

    Resamples for which the figure is undefined, because no question of its kind was drawn, are left out.
    """
    sums = cluster_sums(figure.columns, clusters)
    counted = figure.columns.any(axis=1)
    counted_clusters = sums.any(axis=1)
    num_clusters = int(counted_clusters.sum())
    low = high = float("nan")
    if num_clusters >= 2:
        # Images without a question of this kind add nothing to the sums. Leaving them out changes only the draw.
        weights = draw_weights(num_clusters, num_resamples, seed)
        low, high = _percentiles(figure.combine(weights @ sums[counted_clusters]))
    return Interval(figure.value, low, high, int(counted.sum()), num_clusters)


def paired_difference(
    a: Figure, b: Figure, clusters: Sequence[Hashable], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """Compare two sets of answers to the same questions, in the same order.

    The interval is a paired bootstrap over images. The p-value is that of a two-sided permutation test that swaps A and
    B image by image; with ``R`` permutations it is at least ``1 / (R + 1)``.
    """
    assert a.columns.shape == b.columns.shape, (a.columns.shape, b.columns.shape)
    sums_a, sums_b = cluster_sums(a.columns, clusters), cluster_sums(b.columns, clusters)
    used = sums_a.any(axis=1) | sums_b.any(axis=1)
    sums_a, sums_b = sums_a[used], sums_b[used]
    observed = b.value - a.value
    if len(sums_a) < 2:
        return Difference(observed, float("nan"), float("nan"), float("nan"))
    weights = draw_weights(len(sums_a), num_resamples, seed)
    low, high = _percentiles(b.combine(weights @ sums_b) - a.combine(weights @ sums_a))
    swap = np.random.default_rng(seed + 1).integers(0, 2, size=(num_resamples, len(sums_a)))
    moved = swap @ (sums_b - sums_a)
    permuted = b.combine(sums_b.sum(axis=0) - moved) - a.combine(sums_a.sum(axis=0) + moved)
    permuted = permuted[np.isfinite(permuted)]
    # The small allowance keeps permutations that equal the observation but for rounding.
    num_extreme = int((np.abs(permuted) >= abs(observed) - 1e-12).sum())
    return Difference(observed, low, high, (1 + num_extreme) / (1 + len(permuted)))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
