"""Settings of the engine, and what they come to for a given model on a given machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from babydoctor.engine.kv_cache import KeyValueMemory, slot_bytes
from babydoctor.engine.linear import available_memory_bytes
from babydoctor.schema import UserError

LONGEST_DEFAULT_CONTEXT = 4096
"""Context without ``max_context``, unless the model's own is shorter: longer ones cost memory that few requests use."""


@dataclass(frozen=True)
class EngineSettings:
    """What an operator may set; None means that the engine decides.

    Attributes:
        max_running: requests that are answered at the same time; more wait.
        max_queue: requests that may wait; one more is refused.
        max_context: positions (image slots, prompt and answer) one request may take.
        kv_budget_bytes: memory for keys and values, allocated once; by default a quarter of the free memory on the
            CPU and nine tenths on a GPU, and never more than ``max_running + cached_slots`` slots need.
        cached_slots: slots that only keep prefixes of finished requests; by default as many as ``max_running``.
        image_cache_bytes: memory for features of images seen before.
        step_tokens: rows of one step, decoding requests and prompt chunks together. Small: running answers stream
            evenly. Large: prompts are read faster. By default 256 on the CPU, 1024 on a GPU.
        num_threads: CPU threads of the engine; by default torch's.
        pack_weights: second copy of the weights in oneDNN's layout (CPU); by default where memory allows.
        compile: fuse what lies between matrix products with ``torch.compile`` (GPU; the first requests wait for it).
        cuda_graphs: replay decoding steps as CUDA graphs (GPU).
    """

    max_running: int = 16
    max_queue: int = 256
    max_context: int | None = None
    kv_budget_bytes: int | None = None
    cached_slots: int | None = None
    image_cache_bytes: int = 256 * 2**20
    step_tokens: int | None = None
    num_threads: int | None = None
    pack_weights: bool | None = None
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("max_running", "max_context", "kv_budget_bytes", "step_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine.{name}={value} must be at least 1")
        for name in ("max_queue", "cached_slots", "image_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"engine.{name}={value} must not be negative")

    def context(self, config: LlamaConfig) -> int:
        """Positions of one request.

        Raises:
            UserError: ``max_context`` is more than the model was made for.
        """
        longest = config.max_position_embeddings
        if self.max_context is None:
            return min(longest, LONGEST_DEFAULT_CONTEXT)
        if self.max_context > longest:
            raise UserError(f"engine.max_context={self.max_context}: the model's positions end at {longest}")
        return self.max_context

    def rows_per_step(self, device: torch.device) -> int:
        return self.step_tokens or (1024 if device.type == "cuda" else 256)


def kv_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of keys and values: the model's, but float32 on the CPU.

    Decoding reads a part of each slot, and torch's batched bfloat16 products on the CPU copy such parts before they
    multiply; its float32 products do not. Measured, that more than pays for the doubled memory.
    """
    return torch.float32 if device.type == "cpu" else dtype


def kv_shape(config: LlamaConfig) -> tuple[int, int, int]:
    """Layers, key/value heads and head width."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads or config.num_attention_heads, head_dim


def build_memory(
    settings: EngineSettings, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> KeyValueMemory:
    """Allocate the KV memory that the settings allow.

    Raises:
        UserError: the budget does not hold a single request.
    """
    num_layers, num_kv_heads, head_dim = kv_shape(config)
    capacity = settings.context(config)
    dtype = kv_dtype(dtype, device)
    one = slot_bytes(num_layers, num_kv_heads, head_dim, capacity, dtype)
    budget = settings.kv_budget_bytes
    if budget is None:
        budget = available_memory_bytes() // 4 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] * 9 // 10
    cached = settings.max_running if settings.cached_slots is None else settings.cached_slots
    # One slot of the budget is the scratch slot.
    num_slots = min(budget // one - 1, settings.max_running + cached)
    if num_slots < 1:
        raise UserError(
            f"engine.kv_budget_bytes={budget} does not hold one request of {capacity} positions; it takes at least "
            f"{2 * one} (two slots of {one}). Raise it, or lower engine.max_context={capacity}"
        )
    return KeyValueMemory(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        num_slots=num_slots,
        max_running=min(settings.max_running, num_slots),
        dtype=dtype,
        device=device,
    )
