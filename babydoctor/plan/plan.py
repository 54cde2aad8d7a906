"""Memory and time of a run before it starts: ``babydoctor plan``, and the check at the start of ``babydoctor train``.

``described_model.py`` says what the model is, ``costs.py`` what its tensors and operations cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from babydoctor.config import RunConfig
from babydoctor.plan import costs
from babydoctor.plan.costs import Architecture, Flops, Work
from babydoctor.plan.hardware import Hardware
from babydoctor.plan.lengths import TokenStatistics
from babydoctor.plan.model import Model, describe_model
from babydoctor.schema import UserError

DEFAULT_UTILIZATION = 0.5
"""Share of the matrix peak that a run is planned with; recomputation counts as work."""

CUDA_CONTEXT_BYTES = 800 * 2**20
"""Allowance for CUDA's context, its libraries' code and cuBLAS's workspaces."""

FRAGMENTATION = 0.04
"""Allowance for memory that the CUDA allocator holds and cannot use, as a share of all tensors."""

CHECKPOINTING = ("none", "every:4", "every:2", "full")
"""What ``gradient_checkpointing: auto`` chooses from, least recomputation first."""

MICRO_BATCH_UNIT = 256
AUTO_TARGET_TOKENS = 2048
"""``auto`` recomputes no more than a micro-batch of so many positions needs: enough for matrix products at speed."""
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
    """0 where not even one sample of data.max_length fits."""
    memory: dict[str, int]
    num_steps: int
    flops: Flops
    """Of one optimiser step."""
    samples_per_step: int
    seconds_per_step: float
    utilization: float

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.hardware.memory_bytes

    @property
    def hours(self) -> float:
        return self.num_steps * self.seconds_per_step / 3600

    @property
    def mfu(self) -> float:
        """Share of the peak that goes into the model's own mathematics, without recomputation."""
        return self.flops.model / (self.seconds_per_step * self.hardware.flops_per_s)


def build_plan(
    config: RunConfig,
    hardware: Hardware,
    *,
    statistics: TokenStatistics,
    model: Model | None = None,
    utilization: float = DEFAULT_UTILIZATION,
) -> Plan:
    """Plan one stage; ``auto`` settings are chosen.

    Args:
        statistics: positions per sample.
        model: from ``describe_model``; built anew when None.
    """
    model = model or describe_model(config)
    if not config.train.shares_prefix:
        statistics = replace(statistics, num_prefix=0)
    checkpointing, largest = config.train.gradient_checkpointing, 0
    if checkpointing == "auto":
        for checkpointing in CHECKPOINTING:
            largest = _largest_micro_batch(config, model, hardware, statistics, checkpointing)
            if largest >= min(_step_tokens(config, statistics), max(AUTO_TARGET_TOKENS, config.data.max_length)):
                break
    else:
        largest = _largest_micro_batch(config, model, hardware, statistics, checkpointing)
    tokens = config.train.micro_batch_tokens
    if tokens == "auto":
        tokens = largest or config.data.max_length
    memory = memory_by_part(config, model, hardware, statistics, checkpointing, tokens)
    num_micro_batches, per_micro_batch = _spread_step(config, statistics, tokens)
    flops = costs.count_flops(
        model.shape, micro_batch_work(statistics, per_micro_batch), recompute_every(checkpointing)
    )
    flops = flops.times(num_micro_batches)
    steps = config.train.max_steps or config.train.epochs * math.ceil(statistics.num_samples / config.train.batch_size)
    passes = 2 + 1 / max(1, recompute_every(checkpointing)) * bool(recompute_every(checkpointing))
    # A 4-bit weight is read, written in bfloat16 and read by the product, in every pass over it.
    moved = num_micro_batches * passes * model.dequantized_bytes * 2.25 + 7 * 4 * model.trainable
    return Plan(
        name=config.name,
        hardware=hardware,
        model=model,
        statistics=statistics,
        gradient_checkpointing=checkpointing,
        micro_batch_tokens=tokens,
        largest_micro_batch=largest,
        memory=memory,
        num_steps=steps,
        flops=flops,
        samples_per_step=config.train.batch_size,
        seconds_per_step=flops.total / (hardware.flops_per_s * utilization) + moved / hardware.bytes_per_s,
        utilization=utilization,
    )


def memory_by_part(
    config: RunConfig,
    model: Model,
    hardware: Hardware,
    statistics: TokenStatistics,
    checkpointing: str,
    micro_batch_tokens: int,
) -> dict[str, int]:
    """Peak bytes of a training step by part."""
    largest = max(config.data.max_length, round(1.1 * _step_tokens(config, statistics)))
    work = micro_batch_work(statistics, min(micro_batch_tokens, largest))
    memory = dict(model.weights)
    step = step_bytes(model.shape, work, recompute_every(checkpointing), is_cuda=hardware.is_cuda)
    memory["gradients"] = gradient_bytes(model, step, accumulates=_step_tokens(config, statistics) > work.num_tokens)
    memory["optimiser"] = optimizer_bytes(config, model.trainable)
    memory |= step
    if hardware.is_cuda:
        memory["fragmentation (allowance)"] = round(FRAGMENTATION * sum(memory.values()))
        memory["CUDA context (allowance)"] = CUDA_CONTEXT_BYTES
    return memory


def step_bytes(shape: Architecture, work: Work, every: int, *, is_cuda: bool) -> dict[str, int]:
    """What forward and backward of one micro-batch add to weights, gradients and optimiser."""
    kept = costs.shared_activation_bytes(shape, work)
    largest_recomputed = 0.0
    for index in range(shape.num_layers):
        is_last = index == shape.num_layers - 1
        layer = costs.layer_activation_bytes(shape, work, is_last=is_last, is_cuda=is_cuda)
        if every and index % every == 0:
            kept += costs.recomputed_layer_bytes(shape, work)
            largest_recomputed = max(largest_recomputed, layer)
        else:
            kept += layer
    backward = costs.backward_transient_bytes(shape, work) + largest_recomputed
    logits = costs.logits_bytes(shape, work, is_cuda=is_cuda)
    return {"activations": round(kept), "working space": round(max(backward, logits))}


def gradient_bytes(model: Model, step: dict[str, int], *, accumulates: bool) -> int:
    """Gradients that lie beside activations and working space, as ``step_bytes`` gives them, at the peak.

    A step of one micro-batch has none when its backward pass begins, and they grow while the activations go; from
    the second micro-batch on all of them are there.
    """
    gradients = 4 * model.trainable
    return gradients if accumulates else max(0, gradients - sum(step.values()))


def optimizer_bytes(config: RunConfig, trainable: int) -> int:
    """State of the optimiser: two moments, in float32 or in blocks of 256 bytes with a float32 scale each."""
    return trainable * 8 if config.train.optimizer == "adamw" else round(trainable * 2 * (1 + 4 / 256))


def recompute_every(setting: str) -> int:
    """``gradient_checkpointing`` as the number that ``BabyDoctor.recompute_every`` takes."""
    assert setting != "auto", "auto is resolved by build_plan"
    if setting == "none":
        return 0
    return 1 if setting == "full" else int(setting.removeprefix("every:"))


def check_fits(config: RunConfig, plan: Plan) -> None:
    """Refuse a run that cannot fit.

    Raises:
        UserError: it does not fit; the message names the settings with which it would.
    """
    if plan.fits:
        return
    gib = 2**30
    advice = suggest(config, plan)
    raise UserError(
        f"{config.name} needs {plan.total_bytes / gib:.1f} GiB and {plan.hardware.name} has "
        f"{plan.hardware.memory_bytes / gib:.1f} GiB. "
        + (f"It would fit with: {' '.join(advice)}" if advice else "No setting of this program makes it fit.")
    )


def suggest(config: RunConfig, plan: Plan) -> list[str]:
    """The fewest ``key=value`` overrides, in order of what they cost, that make the run fit; empty if none do."""
    candidates: list[tuple[str, RunConfig]] = []
    taken: list[str] = []
    for override, change in _savings(config):
        config = change(config)
        taken = [*(o for o in taken if o.split("=")[0] != override.split("=")[0]), override]
        candidates.append((override, config))
        trial = build_plan(
            config,
            plan.hardware,
            statistics=plan.statistics,
            model=describe_model(config) if "quantization" in override else replace(plan.model),
        )
        if trial.fits:
            return taken
        if "quantization" in override:
            plan = trial
    return []


def _savings(config: RunConfig) -> Iterable[tuple[str, Any]]:
    def set_in(section: str, **values: Any) -> Any:
        def change(c: RunConfig) -> RunConfig:
            part = getattr(c, section)
            return c.model_copy(update={section: part.model_copy(update=values)})

        return change

    for setting in ("every:4", "every:2", "full"):
        if config.train.gradient_checkpointing != "full":
            yield f"train.gradient_checkpointing={setting}", set_in("train", gradient_checkpointing=setting)
    if config.train.micro_batch_tokens != config.data.max_length:
        tokens = config.data.max_length
        yield f"train.micro_batch_tokens={tokens}", set_in("train", micro_batch_tokens=tokens)
    if config.train.optimizer == "adamw":
        yield "train.optimizer=paged_adamw_8bit", set_in("train", optimizer="paged_adamw_8bit")
    if config.model.quantization == "none":
        yield "model.quantization=nf4", set_in("model", quantization="nf4")


def _largest_micro_batch(
    config: RunConfig, model: Model, hardware: Hardware, statistics: TokenStatistics, checkpointing: str
) -> int:
    """The largest micro-batch that fits, in positions; 0 where one sample of data.max_length does not."""

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


def _step_tokens(config: RunConfig, statistics: TokenStatistics) -> int:
    """Positions of one step's samples in a single micro-batch."""
    return math.ceil(config.train.batch_size * statistics.num_own) + statistics.num_prefix


def _spread_step(config: RunConfig, statistics: TokenStatistics, micro_batch_tokens: int) -> tuple[int, int]:
    """Number of a step's micro-batches, and the positions of each; the shared prefix stands in every one."""
    own = _step_tokens(config, statistics) - statistics.num_prefix
    number = max(1, math.ceil(own / max(1, micro_batch_tokens - statistics.num_prefix)))
    return number, math.ceil(own / number) + statistics.num_prefix


def micro_batch_work(statistics: TokenStatistics, num_tokens: int) -> Work:
    """What a micro-batch of ``num_tokens`` positions holds on average."""
    documents = (num_tokens - statistics.num_prefix) / statistics.num_own
    return Work(
        num_tokens=num_tokens,
        num_documents=documents,
        num_tail=min(num_tokens, round(documents * statistics.num_tail)),
        num_supervised=min(num_tokens, round(documents * statistics.num_supervised)),
        num_images=documents * statistics.num_images,
        num_prefix=statistics.num_prefix,
    )
