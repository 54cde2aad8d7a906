"""Examples -> micro-batches of bounded size with document boundaries. Pure.

One optimiser step takes a fixed number of samples. They are laid into as few micro-batches of at most
``max_tokens`` positions as they fit in, and the positions are spread evenly over these. A micro-batch holds whole
documents end to end and no padding. The loss is normalised over the whole step, so how the samples are spread
changes speed and memory, never the gradient.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from babydoctor.schema import IGNORE_INDEX, Batch, Example, UserError


def plan_bins(lengths: Sequence[int], max_tokens: int, num_ranks: int = 1) -> list[list[int]]:
    """Spread documents over bins of at most ``max_tokens`` positions each.

    Longest documents first, each into the emptiest bin (LPT scheduling), with as few bins as that allows. The
    number of bins is a multiple of ``num_ranks``; some are empty when there are fewer documents than ranks.

    Returns:
        The indices of the documents in each bin, ascending.

    Raises:
        UserError: a document is longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"a sample has {longest} positions, more than train.micro_batch_tokens={max_tokens}; "
            "raise it or lower data.max_length"
        )
    num_bins = max(1, -(-sum(lengths) // max_tokens))
    num_bins = -(-num_bins // num_ranks) * num_ranks
    while (bins := _spread(lengths, max_tokens, num_bins)) is None:
        num_bins += num_ranks
    return bins


def _spread(lengths: Sequence[int], max_tokens: int, num_bins: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, index) for index in range(num_bins)]
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        filled, index = heapq.heappop(heap)
        if filled + lengths[document] > max_tokens:
            return None
        bins[index].append(document)
        heapq.heappush(heap, (filled + lengths[document], index))
    return [sorted(members) for members in bins]


def pack(examples: Sequence[Example], max_tokens: int, num_ranks: int = 1) -> list[Batch]:
    """Pack the examples of one optimiser step into micro-batches; rank ``r`` takes ``batches[r::num_ranks]``."""
    bins = plan_bins([len(example) for example in examples], max_tokens, num_ranks)
    return [build_batch([examples[index] for index in members]) for members in bins]


def build_batch(examples: Sequence[Example]) -> Batch:
    """Lay whole examples end to end. Labels are shifted here, inside each document."""
    assert all(len(example) for example in examples)
    return Batch(
        input_ids=_concatenate([example.input_ids for example in examples], np.int32),
        targets=_concatenate([_shift(example.labels) for example in examples], np.int32),
        position_ids=_concatenate([np.arange(len(example)) for example in examples], np.int32),
        image_mask=_concatenate([example.image_mask for example in examples], np.bool_),
        document_lengths=tuple(len(example) for example in examples),
        ids=tuple(example.id for example in examples),
        images=tuple(image for example in examples for image in example.images),
    )


def _shift(labels: np.ndarray) -> np.ndarray:
    """Position t predicts label t + 1; the last position of a document predicts nothing."""
    return np.append(labels[1:], np.int32(IGNORE_INDEX))


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype) if arrays else np.zeros(0, dtype)
