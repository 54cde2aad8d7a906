"""Counters and histograms of the engine, readable from any thread."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
PER_TOKEN_BOUNDS_S = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


@dataclass(slots=True)
class Histogram:
    """Counts of values at or below each bound, the last count those above all bounds; and their sum."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def copy(self) -> Histogram:
        return Histogram(self.bounds, list(self.counts), self.total)


@dataclass(slots=True)
class EngineStats:
    """A snapshot. Counts grow from the start of the engine; the others are as of now.

    ``per_token_s`` holds, for each answer, its mean time between tokens. ``kv_used`` is the share of KV positions that
    running requests hold.
    """

    queued: int = 0
    running: int = 0
    max_running: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    image_cache_hits: int = 0
    image_cache_misses: int = 0
    image_cache_bytes: int = 0
    kv_bytes: int = 0
    kv_used: float = 0.0
    first_token_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS_S))
    per_token_s: Histogram = field(default_factory=lambda: Histogram(PER_TOKEN_BOUNDS_S))
