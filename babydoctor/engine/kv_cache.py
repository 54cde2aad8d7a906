"""The KV cache: allocated once, with one slot per request and prefixes reused from earlier requests.

Shapes: ``S`` slots, ``K`` key/value heads, ``C`` capacity of a slot in positions, ``D`` head size.

Slots ``0 .. max_running - 1`` hold running requests. They are adjacent in memory, so one batched product can serve
several. The slots after them only keep contents of finished requests, for later prompts with the same prefix. The last
slot is scratch: padding rows of a batch write to it.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

IMAGE_POSITION = -1
"""Stands for an image position when contents of slots are compared. The image's key is compared instead."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Contents of a slot: token ids ``[T]``, and the first position and key of each image."""

    tokens: np.ndarray
    images: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def common_prefix(self, other: Content) -> int:
        """Number of leading positions that are equal in both, image contents included."""
        length = min(len(self), len(other))
        different = np.flatnonzero(self.tokens[:length] != other.tokens[:length])
        same = int(different[0]) if len(different) else length
        for mine, theirs in itertools.zip_longest(self.images, other.images):
            if mine != theirs:
                starts = [image[0] for image in (mine, theirs) if image is not None]
                return min(same, *starts)
        return same

    def head(self, length: int) -> Content:
        """The first ``length`` positions."""
        return Content(self.tokens[:length], tuple(image for image in self.images if image[0] < length))


EMPTY = Content(np.zeros(0, np.int64))


@dataclass(slots=True)
class Slot:
    """State of one slot. ``content`` covers the positions whose keys and values are computed."""

    index: int
    content: Content = EMPTY
    in_use: bool = False
    used_at: int = 0


@dataclass(slots=True)
class Allocation:
    """A slot given to a request. Its first ``num_reused`` positions are already filled."""

    slot: Slot
    num_reused: int


@dataclass(slots=True)
class KVCache:
    """Keys and values of all requests, ``[S + 1, K, C, D]`` each for every layer, and the state of the slots."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    capacity: int
    num_slots: int
    max_running: int
    dtype: torch.dtype
    device: torch.device
    keys: list[torch.Tensor] = field(init=False, repr=False)
    values: list[torch.Tensor] = field(init=False, repr=False)
    slots: list[Slot] = field(init=False, repr=False)
    _clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        assert 1 <= self.max_running <= self.num_slots, (self.max_running, self.num_slots)
        shape = (self.num_slots + 1, self.num_kv_heads, self.capacity, self.head_dim)
        # Zeros, not empty: masked positions are multiplied by 0, and 0 times NaN is NaN.
        self.keys = [_zeros(shape, self.dtype, self.device) for _ in range(self.num_layers)]
        self.values = [_zeros(shape, self.dtype, self.device) for _ in range(self.num_layers)]
        self.slots = [Slot(index) for index in range(self.num_slots)]

    @property
    def scratch(self) -> int:
        """Index of the slot that is never read."""
        return self.num_slots

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_layers * self.keys[0].numel() * self.keys[0].element_size()

    @property
    def num_free(self) -> int:
        return sum(not slot.in_use for slot in self.slots[: self.max_running])

    @property
    def used_fraction(self) -> float:
        """Share of the positions that running requests hold."""
        return sum(len(slot.content) for slot in self.slots if slot.in_use) / (self.num_slots * self.capacity)

    def allocate(self, content: Content) -> Allocation | None:
        """Give a slot to a request whose prompt is ``content``; None if no slot is free.

        The longest prefix that any slot holds is reused: in place if that slot is free and loses less than half of its
        content, else by copying it. The last position of the prompt is always computed, because its logits are needed.
        """
        free = [slot for slot in self.slots[: self.max_running] if not slot.in_use]
        if not free:
            return None
        donor = max(self.slots, key=lambda slot: slot.content.common_prefix(content))
        reused = min(donor.content.common_prefix(content), len(content) - 1)
        if donor in free and 2 * reused > len(donor.content):
            target = donor
        else:
            target = min(free, key=lambda slot: slot.used_at)
            self._archive(target, donor)
            if target is not donor:
                self._copy(donor, target, reused)
        target.content = content.head(reused)
        target.in_use = True
        self._touch(target)
        self._touch(donor)
        return Allocation(target, reused)

    def free(self, slot: Slot, *, scrub: bool = False) -> None:
        """Free a slot. Its content stays for later prompts; ``scrub`` zeroes it instead, because it may be damaged."""
        assert slot.in_use, f"slot {slot.index} was freed twice"
        slot.in_use = False
        self._touch(slot)
        if scrub:
            slot.content = EMPTY
            for cache in (*self.keys, *self.values):
                cache[slot.index].zero_()

    def _archive(self, slot: Slot, donor: Slot) -> None:
        """Copy a finished request's content to a cached slot before it is overwritten, unless another slot holds it.

        ``donor`` is never overwritten, because it is copied next.
        """
        if not len(slot.content):
            return
        others = [other for other in self.slots if other is not slot]
        if any(other.content.common_prefix(slot.content) == len(slot.content) for other in others):
            return
        archive = [other for other in self.slots[self.max_running :] if other is not donor]
        if archive:
            oldest = min(archive, key=lambda other: (len(other.content) > 0, other.used_at))
            self._copy(slot, oldest, len(slot.content))
            oldest.content = slot.content
            oldest.used_at = slot.used_at

    def _copy(self, source: Slot, target: Slot, length: int) -> None:
        if not length:
            return
        for cache in (*self.keys, *self.values):
            cache[target.index, :, :length] = cache[source.index, :, :length]

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory the CPU's operating system provides page by page, when a page is first written.

    ``torch.zeros`` would write all of it now. numpy would request huge pages, each of which spans several heads.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


CacheSource = KVCache | Callable[[], KVCache]
"""A KV cache, or a function that allocates it, which is called once weights are copied and the memory left is known."""


def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
    """Size of one slot in bytes: keys and values of all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * capacity * dtype.itemsize


class FeatureCache:
    """Projected image features by image key. Beyond ``budget_bytes`` the least recently used are dropped."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._features: dict[str, torch.Tensor] = {}

    def get(self, key: str) -> torch.Tensor | None:
        """Features ``[P, D]`` of the image, or None."""
        features = self._features.pop(key, None)
        if features is None:
            self.misses += 1
            return None
        self._features[key] = features  # dicts keep insertion order, so the least recently used comes first
        self.hits += 1
        return features

    def put(self, key: str, features: torch.Tensor) -> None:
        """Keep the features of an image unless they exceed the budget."""
        size = features.numel() * features.element_size()
        if size > self.budget_bytes or key in self._features:
            return
        self._features[key] = features
        self.num_bytes += size
        while self.num_bytes > self.budget_bytes:
            oldest = self._features.pop(next(iter(self._features)))
            self.num_bytes -= oldest.numel() * oldest.element_size()
