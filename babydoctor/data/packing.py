"""Examples -> micro-batches of bounded size with document boundaries. Pure.

One optimizer step takes a fixed number of samples. They are packed into as few micro-batches of at most
``max_tokens`` tokens as possible, with the tokens spread evenly. A micro-batch holds whole documents end to end,
without padding. The loss is normalized over the whole step, so packing changes speed and memory, never the gradient.

The prefix that all samples of a step share (the system prompt) is in each micro-batch once, and every document attends
to it. Attention is causal, so the hidden states of the prefix are the same for all documents. The result is that of
separate documents, except that LoRA dropout is drawn once for the prefix, not for each document.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from babydoctor.schema import IGNORE_INDEX, Batch, Example, UserError

MIN_PREFIX = 16
"""Shorter prefixes are not shared, because sharing costs more than it saves."""


def plan_bins(lengths: Sequence[int], max_tokens: int, num_ranks: int = 1, shared: int = 0) -> list[list[int]]:
    """Spread documents over bins of at most ``max_tokens`` tokens each.

    The first ``shared`` tokens of all documents are the same and count once per bin.

    Each document, longest first, goes into the emptiest bin (LPT scheduling). The number of bins is the smallest
    multiple of ``num_ranks`` that works. Some bins are empty if there are fewer documents than ranks.

    Returns:
        The indices of the documents in each bin, ascending.

    Raises:
        UserError: a document is longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"a sample has {longest} tokens, more than train.micro_batch_tokens={max_tokens}; "
            "raise it or lower data.max_length"
        )
    own, room = [length - shared for length in lengths], max_tokens - shared
    num_bins = max(1, -(-sum(own) // room))
    num_bins = -(-num_bins // num_ranks) * num_ranks
    while (bins := _spread(own, room, num_bins)) is None:
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


def pack(examples: Sequence[Example], max_tokens: int, num_ranks: int = 1, *, share_prefix: bool = True) -> list[Batch]:
    """Pack the examples of one optimizer step into micro-batches; rank ``r`` takes ``batches[r::num_ranks]``."""
    prefix = common_prefix(examples) if share_prefix else 0
    bins = plan_bins([len(example) for example in examples], max_tokens, num_ranks, shared=prefix)
    return [build_batch([examples[index] for index in members], prefix) for members in bins]


def common_prefix(examples: Sequence[Example]) -> int:
    """Length of the text prefix that all examples share, before any supervised token; 0 if it is too short."""
    if len(examples) < 2:
        return 0
    length = min(_sharable(example) for example in examples)
    heads = np.stack([example.input_ids[:length] for example in examples])
    differs = (heads != heads[0]).any(axis=0)
    length = int(differs.argmax()) if differs.any() else length
    return length if length >= MIN_PREFIX else 0


def _sharable(example: Example) -> int:
    """Number of tokens before the first image and before the first token that predicts a target."""
    excluded = example.image_mask.copy()
    excluded[:-1] |= example.labels[1:] != IGNORE_INDEX
    excluded[-1] = True
    return int(excluded.argmax())


def build_batch(examples: Sequence[Example], prefix_length: int = 0) -> Batch:
    """Concatenate whole examples after their common prefix. Labels are shifted here, inside each document."""
    assert all(len(example) > prefix_length for example in examples)
    prefix_length = prefix_length if len(examples) > 1 else 0

    def lay_out(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        pieces = [array[:prefix_length] for array in arrays[:1]] + [array[prefix_length:] for array in arrays]
        return np.concatenate(pieces).astype(dtype) if pieces else np.zeros(0, dtype)

    return Batch(
        input_ids=lay_out([example.input_ids for example in examples], np.int32),
        targets=lay_out([_shift(example.labels) for example in examples], np.int32),
        position_ids=lay_out([np.arange(len(example)) for example in examples], np.int32),
        image_mask=lay_out([example.image_mask for example in examples], np.bool_),
        document_lengths=tuple(len(example) - prefix_length for example in examples),
        ids=tuple(example.id for example in examples),
        images=tuple(image for example in examples for image in example.images),
        prefix_length=prefix_length,
    )


def _shift(labels: np.ndarray) -> np.ndarray:
    """Position t predicts label t + 1; the last position of a document predicts nothing."""
    return np.append(labels[1:], np.int32(IGNORE_INDEX))
