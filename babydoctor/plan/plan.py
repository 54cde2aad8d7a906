"""Memory and time of a run before it starts: ``babydoctor plan``, and the check at the start of ``babydoctor train``.

``model.py`` describes the model, ``lengths.py`` the samples, ``memory.py`` and ``costs.py`` count bytes and operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from babydoctor.config import RunConfig
from babydoctor.plan import costs
from babydoctor.plan.costs import Flops, Work
from babydoctor.plan.hardware import ASSUMED_UTILIZATION, Hardware
from babydoctor.plan.lengths import TokenStatistics
from babydoctor.plan.memory import ALLOWANCE, CPU_PROCESS_BYTES, CUDA_CONTEXT_BYTES, FRAGMENTATION, peak_moment
from babydoctor.plan.model import Model, describe_model
from babydoctor.schema import UserError

DEQUANTIZATION_TRAFFIC = 1.25
"""Bytes moved to dequantize a weight, per byte of its float size: 4 bits are read and 16 written for each element."""

CHECKPOINTING = ("none", "every:4", "every:2", "full")
"""What ``gradient_checkpointing: auto`` chooses from, least recomputation first."""

MICRO_BATCH_UNIT = 256
AUTO_TARGET_TOKENS = 2048
"""``auto`` accepts a setting that allows a micro-batch of this many tokens: matrix products of this size run at full
speed, so a larger micro-batch is not worth recomputing for."""
AUTO_MAX_TOKENS = 16384


@dataclass(frozen=True)
class Plan:
    """A run's memory and time. ``memory`` is in bytes, by part, in the order in which it is shown."""

    name: str
    hardware: Hardware
    model: Model
    statistics: TokenStatistics
    gradient_checkpointing: str
    micro_batch_tokens: int
    largest_micro_batch: int
    """In tokens; 0 if not even one sample of data.max_length fits."""
    memory: dict[str, int]
    num_steps: int
    flops: Flops
    """Operations of one optimizer step."""
    samples_per_step: int
    seconds_per_step: float
    utilization: float

    @property
    def total_bytes(self) -> int:
        """All memory of the process on the device, allowances included."""
        return sum(self.memory.values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors alone, which is what ``bench.measure`` measures."""
        return sum(size for part, size in self.memory.items() if not part.endswith(ALLOWANCE))

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.hardware.memory_bytes

    @property
    def hours(self) -> float:
        return self.num_steps * self.seconds_per_step / 3600

    @property
    def mfu(self) -> float:
        """Share of the peak that goes into the model's own operations, without recomputation."""
        return self.flops.model / (self.seconds_per_step * self.hardware.flops_per_s)


def build_plan(
    config: RunConfig,
    hardware: Hardware,
    *,
    statistics: TokenStatistics,
    model: Model | None = None,
    utilization: float = ASSUMED_UTILIZATION,
) -> Plan:
    """Plan one stage and choose its ``auto`` settings.

    Args:
        statistics: tokens per sample.
        model: from ``describe_model``; None: described here.
        utilization: share of ``hardware.flops_per_s`` that the run reaches; recomputation counts as work.
    """
    model = model or describe_model(config)
    if not config.train.shares_prefix:
        statistics = replace(statistics, num_prefix=0)
    checkpointing, largest = choose_checkpointing(config, model, hardware, statistics)
    tokens = config.train.micro_batch_tokens
    if tokens == "auto":
        tokens = largest or config.data.max_length
    every = recompute_every(checkpointing)
    num_micro_batches, per_micro_batch = _spread_step(config, statistics, tokens)
    work = micro_batch_work(statistics, per_micro_batch)
    flops = costs.count_flops(model.shape, work, every).times(num_micro_batches)
    steps = config.train.max_steps or config.train.epochs * math.ceil(statistics.num_samples / config.train.batch_size)
    passes = num_micro_batches * costs.passes_over_weights(every)
    moved = passes * model.dequantized_bytes * DEQUANTIZATION_TRAFFIC
    moved += 7 * 4 * model.trainable  # AdamW reads four float32 per parameter and writes three
    return Plan(
        name=config.name,
        hardware=hardware,
        model=model,
        statistics=statistics,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=tokens,
        largest_micro_batch=largest,
        memory=memory_by_part(config, model, hardware, statistics, checkpointing, tokens),
        num_steps=steps,
        flops=flops,
        samples_per_step=config.train.batch_size,
        seconds_per_step=flops.total / (hardware.flops_per_s * utilization) + moved / hardware.bytes_per_s,
        utilization=utilization,
    )


def choose_checkpointing(
    config: RunConfig, model: Model, hardware: Hardware, statistics: TokenStatistics
) -> tuple[str, int]:
    """The setting of gradient checkpointing, chosen if it is ``auto``, and the largest micro-batch with it."""
    setting = config.train.gradient_checkpointing
    if setting != "auto":
        return setting, largest_micro_batch(config, model, hardware, statistics, setting)
    enough = min(_step_tokens(config, statistics), max(AUTO_TARGET_TOKENS, config.data.max_length))
    largest = 0
    for setting in CHECKPOINTING:
        largest = largest_micro_batch(config, model, hardware, statistics, setting)
        if largest >= enough:
            break
    return setting, largest


def memory_by_part(
    config: RunConfig,
    model: Model,
    hardware: Hardware,
    statistics: TokenStatistics,
    checkpointing: str,
    micro_batch_tokens: int,
) -> dict[str, int]:
    """Bytes by part at the peak of a training step."""
    step_tokens = _step_tokens(config, statistics)
    # A step's samples can be longer than the mean.
    longest = max(config.data.max_length, round(1.1 * step_tokens))
    work = micro_batch_work(statistics, min(micro_batch_tokens, longest))
    memory = tensors_by_part(
        config, model, work, checkpointing, accumulates=step_tokens > work.num_tokens, is_cuda=hardware.is_cuda
    )
    if hardware.is_cuda:
        memory[f"fragmentation {ALLOWANCE}"] = round(FRAGMENTATION * sum(memory.values()))
        memory[f"CUDA context {ALLOWANCE}"] = CUDA_CONTEXT_BYTES
    else:
        memory[f"Python and libraries {ALLOWANCE}"] = CPU_PROCESS_BYTES
    return memory


def tensors_by_part(
    config: RunConfig, model: Model, work: Work, checkpointing: str, *, accumulates: bool, is_cuda: bool
) -> dict[str, int]:
    """Bytes of tensors by part at the peak of a step whose largest micro-batch is ``work``.

    Args:
        accumulates: True if the step has several micro-batches.
    """
    peak = peak_moment(model.shape, work, recompute_every(checkpointing), accumulates=accumulates, is_cuda=is_cuda)
    return model.weights | {
        "optimizer state": optimizer_bytes(config, model.trainable),
        "gradients (float32)": round(peak.gradients),
        "activations": round(peak.activations),
        "working space": round(peak.working),
    }


def optimizer_bytes(config: RunConfig, trainable: int) -> int:
    """Two moments per parameter: float32, or 8 bits with a float32 scale per block of 256."""
    return trainable * 8 if config.train.optimizer == "adamw" else round(trainable * 2 * (1 + 4 / 256))


def recompute_every(setting: str) -> int:
    """``gradient_checkpointing`` as the number that ``BabyDoctor.recompute_every`` takes."""
    assert setting != "auto", "auto is resolved by build_plan"
    if setting == "none":
        return 0
    return 1 if setting == "full" else int(setting.removeprefix("every:"))


def largest_micro_batch(
    config: RunConfig, model: Model, hardware: Hardware, statistics: TokenStatistics, checkpointing: str
) -> int:
    """The largest micro-batch that fits, in tokens; 0 if one sample of data.max_length does not fit."""

    def fits(tokens: int) -> bool:
        memory = memory_by_part(config, model, hardware, statistics, checkpointing, tokens)
        return sum(memory.values()) <= hardware.memory_bytes

    most = max(config.data.max_length, min(AUTO_MAX_TOKENS, _step_tokens(config, statistics)))
    if not fits(config.data.max_length):
        return 0
    if fits(most):
        return most
    low, high = config.data.max_length // MICRO_BATCH_UNIT, most // MICRO_BATCH_UNIT + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * MICRO_BATCH_UNIT) else (low, middle)
    return max(config.data.max_length, low * MICRO_BATCH_UNIT)


def micro_batch_work(statistics: TokenStatistics, num_tokens: int) -> Work:
    """What a micro-batch of ``num_tokens`` tokens holds on average."""
    documents = (num_tokens - statistics.num_prefix) / statistics.num_own
    return Work(
        num_tokens=num_tokens,
        num_documents=documents,
        num_tail=min(num_tokens, round(documents * statistics.num_tail)),
        num_supervised=min(num_tokens, round(documents * statistics.num_supervised)),
        num_images=documents * statistics.num_images,
        num_prefix=statistics.num_prefix,
    )


def check_fits(config: RunConfig, plan: Plan) -> None:
    """Refuse a run that cannot fit.

    Raises:
        UserError: it does not fit; the message names settings with which it would.
    """
    if plan.fits:
        return
    gib, advice = 2**30, suggest(config, plan)
    raise UserError(
        f"{config.name} needs {plan.total_bytes / gib:.1f} GiB and {plan.hardware.name} has "
        f"{plan.hardware.memory_bytes / gib:.1f} GiB. "
        + (f"It would fit with: {' '.join(advice)}" if advice else "No setting of this program makes it fit.")
    )


def suggest(config: RunConfig, plan: Plan) -> list[str]:
    """The fewest ``key=value`` overrides, cheapest first, that make the run fit; empty if none do."""
    taken: dict[str, str] = {}
    model: Model = plan.model
    for section, key, value in _savings(config):
        config = with_settings(config, section, **{key: value})
        taken[key] = f"{section}.{key}={value}"
        if key == "quantization":
            model = describe_model(config)
        if build_plan(config, plan.hardware, statistics=plan.statistics, model=model).fits:
            return list(taken.values())
    return []


def with_settings(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The configuration with other values in one section."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def _savings(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """Settings that save memory, in the order of what they cost."""
    for setting in ("every:4", "every:2", "full"):
        if config.train.gradient_checkpointing != "full":
            yield "train", "gradient_checkpointing", setting
    if config.train.micro_batch_tokens != config.data.max_length:
        yield "train", "micro_batch_tokens", config.data.max_length
    if config.train.optimizer == "adamw":
        yield "train", "optimizer", "paged_adamw_8bit"
    if config.model.quantization == "none":
        yield "model", "quantization", "nf4"


def _step_tokens(config: RunConfig, statistics: TokenStatistics) -> int:
    """Tokens of one step's samples in a single micro-batch."""
    return math.ceil(config.train.batch_size * statistics.num_own) + statistics.num_prefix


def micro_batches_per_step(config: RunConfig, statistics: TokenStatistics, micro_batch_tokens: int) -> int:
    """Number of micro-batches in a step."""
    return _spread_step(config, statistics, micro_batch_tokens)[0]


def _spread_step(config: RunConfig, statistics: TokenStatistics, micro_batch_tokens: int) -> tuple[int, int]:
    """Number of a step's micro-batches, and the tokens of each; every one holds the shared prefix."""
    own = _step_tokens(config, statistics) - statistics.num_prefix
    number = max(1, math.ceil(own / max(1, micro_batch_tokens - statistics.num_prefix)))
    return number, math.ceil(own / number) + statistics.num_prefix
