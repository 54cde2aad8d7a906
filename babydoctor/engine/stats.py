"""Counters and gauges of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine. Counters grow from its start; gauges are as of now.

    Attributes:
        queued: gauge, requests that wait.
        running: gauge, requests that have a slot.
        jobs: gauge, other work with the model that runs or waits, such as occlusion maps.
        max_running: most requests that run at the same time.
        steps: steps computed.
        prompt_tokens: prompt tokens of admitted requests, cached ones included.
        cached_prompt_tokens: those whose keys and values came from an earlier request.
        generated_tokens: tokens of answers.
        finished: finished requests by finish reason.
        image_cache_hits: images whose features were cached.
        image_cache_misses: images that were encoded.
        image_cache_bytes: gauge, size of the cached features.
        kv_bytes: size of the KV cache.
        kv_used: gauge, share of the KV cache's positions that running requests hold.
    """

    queued: int = 0
    running: int = 0
    jobs: int = 0
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
