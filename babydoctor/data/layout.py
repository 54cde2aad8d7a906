"""The layout of a packed micro-batch, computed once on the host and copied to the device once.

Document lengths and targets determine the attention mask, the image slots and the loss positions. All of this is
computed here, in the process that reads the data, so a training step on a GPU never waits to read a value back.

Shapes: ``T`` tokens, ``Q`` tokens from each document's first target on, ``M`` loss positions, ``N`` images, ``P``
patches per image, ``S`` spans, ``L`` keys of all spans together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from babydoctor.schema import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class Span:
    """Consecutive query rows and the keys they see: the shared prefix, and ``keys`` up to their own position."""

    rows: slice
    shared: int
    """Length of the prefix that every document sees."""
    keys: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def num_keys(self) -> int:
        return self.shared + self.keys.stop - self.keys.start


def build_spans(
    document_lengths: Sequence[int], query_lengths: Sequence[int] | None = None, prefix_length: int = 0
) -> tuple[Span, ...]:
    """One span per document, in order. The shared prefix comes first if it is queried.

    Args:
        document_lengths: lengths that sum to ``T - prefix_length``.
        query_lengths: how many of each document's last tokens are queries. None: all of them, and the prefix too.
        prefix_length: leading tokens that every document sees.
    """
    spans = []
    first_row, first_key = 0, prefix_length
    if query_lengths is None:
        query_lengths = document_lengths
        if prefix_length:
            spans.append(Span(slice(0, prefix_length), 0, slice(0, prefix_length)))
            first_row = prefix_length
    for length, num_queries in zip(document_lengths, query_lengths, strict=True):
        assert num_queries <= length, (num_queries, length)
        rows, keys = slice(first_row, first_row + num_queries), slice(first_key, first_key + length)
        spans.append(Span(rows, prefix_length, keys))
        first_row, first_key = rows.stop, keys.stop
    return tuple(spans)


@dataclass(frozen=True, eq=False)
class SharedKeys:
    """Index tensors that copy the prefix's keys to each document, for kernels without support for shared keys.

    ``gather`` ``[L]``: the keys of each span, one span after the other. ``own`` ``[T - prefix_length]``: where each
    document's own keys went. ``copies`` ``[C * prefix_length]``: where the ``C`` copies of the prefix went.
    """

    gather: torch.Tensor
    own: torch.Tensor
    copies: torch.Tensor
    prefix_length: int


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which query rows see which keys.

    ``spans`` serves the CPU. A variable-length kernel reads ``query_bounds`` and ``key_bounds``, int32 ``[S + 1]``
    cumulative lengths, and ``shared`` if a prefix is shared; all three are absent until ``to`` has been called.
    """

    spans: tuple[Span, ...]
    max_rows: int
    max_keys: int
    query_bounds: torch.Tensor | None = None
    key_bounds: torch.Tensor | None = None
    shared: SharedKeys | None = None


def build_attention_layout(
    document_lengths: Sequence[int],
    query_lengths: Sequence[int] | None = None,
    prefix_length: int = 0,
    device: torch.device | str = "cpu",
) -> AttentionLayout:
    """A layout without a batch, for tests and single documents. Training copies whole ``PackedBatch`` objects."""
    host = _HostLayout(build_spans(document_lengths, query_lengths, prefix_length), prefix_length)
    if torch.device(device).type == "cpu":
        return host.layout
    return host.attach([torch.from_numpy(array).to(device) for array in host.arrays])


class _HostLayout:
    """A layout and the NumPy arrays that its device tensors are made from."""

    def __init__(self, spans: tuple[Span, ...], prefix_length: int) -> None:
        rows, keys = [span.num_rows for span in spans], [span.num_keys for span in spans]
        self.prefix_length = prefix_length
        self.layout = AttentionLayout(spans, max(rows, default=0), max(keys, default=0))
        self.arrays = [_cumulative(rows), _cumulative(keys)]
        if any(span.shared for span in spans):
            self.arrays += _shared_key_arrays(spans, prefix_length)

    def attach(self, tensors: Sequence[torch.Tensor]) -> AttentionLayout:
        """The layout with ``tensors``, which hold ``arrays`` on a device."""
        query_bounds, key_bounds, *index = tensors
        shared = SharedKeys(index[0].long(), index[1].long(), index[2].long(), self.prefix_length) if index else None
        return replace(self.layout, query_bounds=query_bounds, key_bounds=key_bounds, shared=shared)


def _cumulative(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _shared_key_arrays(spans: Sequence[Span], prefix_length: int) -> list[np.ndarray]:
    """``gather``, ``own`` and ``copies`` of ``SharedKeys``."""
    prefix = np.arange(prefix_length)
    gather = [np.concatenate([prefix[: span.shared], np.arange(span.keys.start, span.keys.stop)]) for span in spans]
    together = np.concatenate(gather)
    is_own = together >= prefix_length
    return [array.astype(np.int32) for array in (together, is_own.nonzero()[0], (~is_own).nonzero()[0])]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch, the input of the model.

    Attributes:
        input_ids, position_ids: int64 ``[T]``, documents end to end; image slots hold any valid id.
        image_index: int64 ``[N * P]``, where the image slots are.
        tail_index: int64 ``[Q]``, the tokens that the last layer's queries are computed for.
        loss_index: int64 ``[M]``, the loss positions among the ``Q``.
        loss_targets: int64 ``[M]``, the token that each of them predicts.
        every: attention of all layers but the last.
        tail: attention of the last layer, of the ``Q`` tail tokens only.
        pixel_values: float32 ``[N, 3, S, S]``, or None without images.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    image_index: torch.Tensor
    tail_index: torch.Tensor
    loss_index: torch.Tensor
    loss_targets: torch.Tensor
    every: AttentionLayout
    tail: AttentionLayout
    pixel_values: torch.Tensor | None


class HostBatch:
    """A micro-batch on the host: one int32 tensor, and pixels. ``to`` moves it in two copies.

    The tensors are pinned by a data loader that pins memory, so the copies do not block.
    """

    def __init__(self, batch: Batch, pixel_values: torch.Tensor | None = None) -> None:
        self.prefix_length, self.document_lengths = batch.prefix_length, batch.document_lengths
        prefix, lengths = batch.prefix_length, batch.document_lengths
        tails = tail_lengths(batch.targets[prefix:], lengths)
        tail_index = _tail_index(lengths, tails, prefix)
        targets = batch.targets[tail_index]
        loss_index = (targets != IGNORE_INDEX).nonzero()[0]
        self._every = _HostLayout(build_spans(lengths, None, prefix), prefix)
        self._tail = _HostLayout(build_spans(lengths, tails, prefix), prefix)
        arrays = [batch.input_ids, batch.position_ids, batch.image_mask.nonzero()[0]]
        arrays += [tail_index, loss_index, targets[loss_index]]
        self._num_long = len(arrays)
        arrays += [*self._every.arrays, *self._tail.arrays]
        self._sizes = [len(array) for array in arrays]
        self.numbers = torch.from_numpy(np.concatenate(arrays).astype(np.int32))
        self.pixel_values = pixel_values

    def pin_memory(self) -> HostBatch:
        """The hook that torch's data loader calls."""
        self.numbers = self.numbers.pin_memory()
        self.pixel_values = None if self.pixel_values is None else self.pixel_values.pin_memory()
        return self

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move to the device without waiting for it."""
        numbers = self.numbers.to(device, non_blocking=True)
        long_size = sum(self._sizes[: self._num_long])
        long = numbers[:long_size].long().split(self._sizes[: self._num_long])
        every, tail = self._every.layout, self._tail.layout
        if numbers.device.type != "cpu":
            rest = numbers[long_size:].split(self._sizes[self._num_long :])
            every = self._every.attach(rest[: len(self._every.arrays)])
            tail = self._tail.attach(rest[len(self._every.arrays) :])
        pixels = None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True)
        input_ids, position_ids, image_index, tail_index, loss_index, loss_targets = long
        return PackedBatch(
            input_ids=input_ids,
            position_ids=position_ids,
            image_index=image_index,
            tail_index=tail_index,
            loss_index=loss_index,
            loss_targets=loss_targets,
            every=every,
            tail=tail,
            pixel_values=pixels,
        )


def tail_lengths(targets: np.ndarray, document_lengths: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each document from its first target on; at least 1.

    Args:
        targets: ``[T - prefix_length]``, ``IGNORE_INDEX`` where nothing is supervised.
    """
    tails, start = [], 0
    for length in document_lengths:
        supervised = targets[start : start + length] != IGNORE_INDEX
        tails.append(length - int(supervised.argmax()) if supervised.any() else 1)
        start += length
    return tuple(tails)


def _tail_index(document_lengths: Sequence[int], tails: Sequence[int], prefix_length: int) -> np.ndarray:
    ends = prefix_length + np.cumsum(document_lengths)
    pieces = [np.arange(end - tail, end) for end, tail in zip(ends, tails, strict=True)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
