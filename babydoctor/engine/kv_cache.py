"""KV memory: allocated once, one slot a request, prefixes taken over or copied from earlier requests.

Shapes: ``S`` slots, ``K`` key/value heads, ``C`` positions a slot holds, ``D`` head width.

Slots ``0 .. max_running - 1`` hold running requests, side by side so that one batched product serves neighbours. The
slots above only keep what finished requests left, for later prompts that begin the same way. One more slot at the end
is a place to write to for rows of a batch that belong to nobody.
"""

from __future__ import annotations

import itertools
import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch

IMAGE_POSITION = -1
"""Stands for an image position where contents of slots are compared; the image's key decides then."""


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What the positions of a slot stand for: token ids ``[T]`` and where which image begins."""

    tokens: np.ndarray
    images: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def common_prefix(self, other: Content) -> int:
        """Number of leading positions that are the same in both, image contents included."""
        length = min(len(self), len(other))
        different = np.flatnonzero(self.tokens[:length] != other.tokens[:length])
        same = int(different[0]) if len(different) else length
        for mine, theirs in itertools.zip_longest(self.images, other.images):
            if mine != theirs:
                starts = [image[0] for image in (mine, theirs) if image is not None]
                return min(same, *starts)
        return same

    def head(self, length: int) -> Content:
        return Content(self.tokens[:length], tuple(image for image in self.images if image[0] < length))


EMPTY = Content(np.zeros(0, np.int64))


@dataclass(slots=True)
class Slot:
    """Book-keeping of one slot. ``content`` covers the positions whose keys and values are computed."""

    index: int
    content: Content = EMPTY
    in_use: bool = False
    used_at: int = 0


@dataclass(slots=True)
class Claim:
    """A slot given to a request, of which the first ``num_reused`` positions are filled already."""

    slot: Slot
    num_reused: int


@dataclass(slots=True)
class KeyValueMemory:
    """Keys and values of all requests, ``[S + 1, K, C, D]`` each for every layer, and who has which slot."""

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
        # Zeros, not empty: masked positions are multiplied by 0, and 0 times a stray NaN is NaN.
        self.keys = [_zeros(shape, self.dtype, self.device) for _ in range(self.num_layers)]
        self.values = [_zeros(shape, self.dtype, self.device) for _ in range(self.num_layers)]
        self.slots = [Slot(index) for index in range(self.num_slots)]

    @property
    def scratch(self) -> int:
        """Index of the slot that nobody reads."""
        return self.num_slots

    @property
    def num_bytes(self) -> int:
        return 2 * self.num_layers * self.keys[0].numel() * self.keys[0].element_size()

    @property
    def num_free(self) -> int:
        return sum(not slot.in_use for slot in self.slots[: self.max_running])

    @property
    def used_fraction(self) -> float:
        """Share of the positions that running requests hold now."""
        return sum(len(slot.content) for slot in self.slots if slot.in_use) / (self.num_slots * self.capacity)

    def claim(self, content: Content) -> Claim | None:
        """Give a slot to a request whose prompt is ``content``; None when all are taken.

        The longest prefix that any slot holds is reused: in place if that slot is free and would lose little, else by
        one copy. At least the last position of the prompt is left to compute, since its logits are needed.
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
        return Claim(target, reused)

    def release(self, slot: Slot, *, scrub: bool = False) -> None:
        """Take a slot back. Its content stays for later prompts, unless ``scrub`` says that it is damaged."""
        assert slot.in_use, f"slot {slot.index} was given back twice"
        slot.in_use = False
        self._touch(slot)
        if scrub:
            slot.content = EMPTY
            for memory in (*self.keys, *self.values):
                memory[slot.index].zero_()

    def forget(self) -> None:
        """Drop what finished requests left (prefixes of running ones stay)."""
        for slot in self.slots:
            if not slot.in_use:
                slot.content = EMPTY

    def _archive(self, slot: Slot, donor: Slot) -> None:
        """Keep a finished request's content before its slot is written over, unless another slot holds it all.

        ``donor`` is about to be copied from and stays as it is.
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
        for memory in (*self.keys, *self.values):
            memory[target.index, :, :length] = memory[source.index, :, :length]

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used_at = self._clock


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that on the CPU take real memory only where something was written: pages come from the system as they are
    touched. (torch would write the zeros itself; numpy asks for huge pages, of which one spans several heads.)"""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> int:
    """Size of one slot in bytes: keys and values of all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * capacity * dtype.itemsize


class FeatureCache:
    """Projected image features by image key, the least recently used dropped beyond ``budget_bytes``."""

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
        self._features[key] = features  # a dict keeps the order of insertion: the oldest comes first
        self.hits += 1
        return features

    def put(self, key: str, features: torch.Tensor) -> None:
        size = features.numel() * features.element_size()
        if size > self.budget_bytes or key in self._features:
            return
        self._features[key] = features
        self.num_bytes += size
        while self.num_bytes > self.budget_bytes:
            oldest = self._features.pop(next(iter(self._features)))
            self.num_bytes -= oldest.numel() * oldest.element_size()
