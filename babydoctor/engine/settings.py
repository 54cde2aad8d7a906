"""Settings of the engine, and the KV cache that follows from them for a model and a machine."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

import torch
import yaml

from babydoctor.engine.kv_cache import KVCache, slot_bytes
from babydoctor.engine.linear import available_memory_bytes
from babydoctor.model.families import LanguageConfig
from babydoctor.schema import UserError

MAX_DEFAULT_CONTEXT = 4096
"""Default context of models with a longer one, whose KV cache would be larger than most requests need."""

WEIGHTS = ("int8",)
"""What the weights can be rounded to."""

KV_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

StartHook = Callable[[str, int | None], None]
"""Called with the device type (``cpu`` or ``cuda``) and ``num_threads`` before the engine's thread starts."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the engine. None means that the engine decides.

    Attributes:
        max_running: most requests that are answered at the same time; further requests wait.
        max_queue: most requests that wait; further requests are refused.
        max_context: most tokens of one request, prompt, image slots and answer together.
        kv_budget_bytes: memory for keys and values, allocated once; by default a quarter of the memory that is free
            on the CPU once weights are copied, or nine tenths on a GPU, and never more than
            ``max_running + cached_slots`` slots need.
        kv_dtype: precision of keys and values: float32, bfloat16 or float16; by default see ``build_kv_cache``.
        cached_slots: slots that only keep prefixes of finished requests; by default as many as ``max_running``.
        image_cache_bytes: memory for features of images seen before.
        step_tokens: rows of one step, decoding requests and prompt chunks together. With a small value running answers
            stream evenly, with a large one prompts are read faster. By default 256 on the CPU, 1024 on a GPU.
        num_threads: CPU threads of the engine; by default torch's. The thread count belongs to the process, so an
            ``on_start`` must set it, as the command line's does.
        weights: ``int8`` rounds the weights to eight bits with a scale per output (CPU), and each row of a product's
            input as well. A step then reads half of the bytes of bfloat16. A LoRA is merged into the weights first. By
            default they stay unchanged.
        pack_weights: second copy of the weights in a layout that multiplies faster (CPU); by default where memory
            allows.
        cuda_graphs: replay decoding steps and the vision tower as CUDA graphs; by default on a GPU with Triton.
        own_weights: for callers from Python. The engine is the model's only user, so it may join weights in place
            and free weights that it has copied. The model is of no use afterwards.
        on_start: for callers from Python. Called when weights are loaded and packed. The engine itself changes nothing
            process-wide; the command line sets its CPU switches here.
    """

    max_running: int = 16
    max_queue: int = 256
    max_context: int | None = None
    kv_budget_bytes: int | None = None
    kv_dtype: str | None = None
    cached_slots: int | None = None
    image_cache_bytes: int = 256 * 2**20
    step_tokens: int | None = None
    num_threads: int | None = None
    weights: str | None = None
    pack_weights: bool | None = None
    cuda_graphs: bool | None = None
    own_weights: bool = field(default=False, repr=False, metadata={"hidden": True})
    on_start: StartHook | None = field(default=None, repr=False, compare=False, metadata={"hidden": True})

    def __post_init__(self) -> None:
        for name, kinds in _kinds().items():
            value = getattr(self, name)
            if type(value) not in kinds:
                raise UserError(f"engine.{name}={value!r} must be {_NOUNS[kinds[0]]}")
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            raise UserError(f"engine.kv_dtype={self.kv_dtype} must be one of {', '.join(KV_DTYPES)}")
        if self.weights is not None and self.weights not in WEIGHTS:
            raise UserError(f"engine.weights={self.weights} must be {' or '.join(WEIGHTS)}; remove it to keep them")
        for name in ("max_running", "max_context", "kv_budget_bytes", "step_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine.{name}={value} must be at least 1")
        for name in ("max_queue", "cached_slots", "image_cache_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"engine.{name}={value} must not be negative")
        if self.on_start is not None and not callable(self.on_start):
            raise UserError(f"engine.on_start={self.on_start!r} is for callers from Python; remove it")
        if self.num_threads is not None and self.on_start is None:
            raise UserError(
                f"engine.num_threads={self.num_threads} needs on_start, a function that sets the thread count of the "
                "process. From Python, call torch.set_num_threads instead"
            )

    def context(self, config: LanguageConfig) -> int:
        """Tokens of one request.

        Raises:
            UserError: ``max_context`` exceeds the model's context.
        """
        longest = config.max_position_embeddings
        if self.max_context is None:
            return min(longest, MAX_DEFAULT_CONTEXT)
        if self.max_context > longest:
            raise UserError(f"engine.max_context={self.max_context} exceeds the model's {longest} positions; lower it")
        return self.max_context

    def rows_per_step(self, device: torch.device) -> int:
        """Rows of one step on a device."""
        return self.step_tokens or (1024 if device.type == "cuda" else 256)


_NOUNS: dict[type, str] = {int: "a whole number", bool: "true or false", str: "a name"}


def setting_names() -> list[str]:
    """Names of the settings that an operator may give."""
    return [item.name for item in fields(EngineSettings) if not item.metadata.get("hidden")]


def _kinds() -> dict[str, tuple[type, ...]]:
    """The types that each setting may have."""
    hints = get_type_hints(EngineSettings)
    return {name: get_args(hints[name]) or (hints[name],) for name in setting_names()}


def build_settings(given: Mapping[str, Any], **defaults: Any) -> EngineSettings:
    """Settings from what an operator gave, and a command's own defaults for the rest.

    Raises:
        UserError: a setting does not exist, or its value is of the wrong kind or out of range.
    """
    known = setting_names()
    for name in given:
        if name not in known and name != "on_start":
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean 'engine.{near[0]}'?" if near else f"the engine has {', '.join(sorted(known))}"
            raise UserError(f"engine.{name} is not a setting of the engine; {hint}")
    return EngineSettings(**{**defaults, **given})


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read ``engine.key=value`` words of a command line; values are YAML.

    Raises:
        UserError: a word is something else.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.startswith("engine."):
            raise UserError(
                f"{override!r} is not a setting of this command; write engine.key=value, for example "
                "engine.max_context=1024"
            )
        try:
            given[key.removeprefix("engine.")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{override!r}: the value is not valid YAML ({error})") from None
    return given


def preferred_kv_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The fastest precision of keys and values: float32 on the CPU, the model's elsewhere.

    Decoding reads a part of each slot. On the CPU, torch's batched bfloat16 products copy that part first and its
    float32 products do not. Measured, the saved copy outweighs the doubled memory.
    """
    return torch.float32 if device.type == "cpu" else dtype


def kv_shape(config: LanguageConfig) -> tuple[int, int, int]:
    """Number of layers, number of key/value heads and head size of a model's keys and values."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads or config.num_attention_heads, head_dim


def build_kv_cache(
    settings: EngineSettings,
    config: LanguageConfig,
    dtype: torch.dtype,
    device: torch.device,
    preferred: torch.dtype | None = None,
) -> KVCache:
    """Allocate the KV cache that the settings allow.

    The precision is ``settings.kv_dtype``. By default it is ``preferred``, which the decoder asks for, or the fastest
    one, if ``max_running`` requests then fit the budget; else the model's. A 7B model's cache takes 1 MiB per token in
    float32 and half of that in bfloat16.

    Raises:
        UserError: the budget does not hold a single request; the message names what to lower.
    """
    shape = kv_shape(config)
    capacity = settings.context(config)
    budget = settings.kv_budget_bytes
    if budget is None:
        budget = available_memory_bytes() // 4 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] * 9 // 10

    def num_fitting(kv_dtype: torch.dtype) -> int:
        return budget // slot_bytes(*shape, capacity, kv_dtype) - 1  # one slot of the budget is the scratch slot

    if settings.kv_dtype is not None:
        chosen = KV_DTYPES[settings.kv_dtype]
    else:
        chosen = preferred or preferred_kv_dtype(dtype, device)
        if num_fitting(chosen) < settings.max_running and dtype.itemsize < chosen.itemsize:
            chosen = dtype
    cached = settings.max_running if settings.cached_slots is None else settings.cached_slots
    num_slots = min(num_fitting(chosen), settings.max_running + cached)
    if num_slots < 1:
        raise UserError(_too_small(settings, budget, capacity, slot_bytes(*shape, capacity, chosen), chosen))
    return KVCache(
        num_layers=shape[0],
        num_kv_heads=shape[1],
        head_dim=shape[2],
        capacity=capacity,
        num_slots=num_slots,
        max_running=min(settings.max_running, num_slots),
        dtype=chosen,
        device=device,
    )


def _too_small(settings: EngineSettings, budget: int, capacity: int, one: int, dtype: torch.dtype) -> str:
    """The error message for a KV cache that does not fit."""
    name = str(dtype).removeprefix("torch.")
    need = f"a KV cache for one request of {capacity} tokens takes {2 * one:,} bytes in {name} (two slots of {one:,})"
    most = budget // (2 * one // capacity)
    lower = f"lower engine.max_context={capacity} to at most {most}" if most else "lower engine.max_context"
    if dtype.itemsize > 2:
        lower += ", set engine.kv_dtype=bfloat16"
    if settings.kv_budget_bytes is not None:
        return f"engine.kv_budget_bytes={budget} is too small: {need}. Raise it, or {lower}"
    return (
        f"memory is too small: {need}, and {budget:,} bytes of the free memory are set aside for it. To fit, {lower}, "
        "free some memory, or raise engine.kv_budget_bytes"
    )
