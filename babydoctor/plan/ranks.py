"""A stage on several GPUs: memory of each rank, bytes that it sends in a step, and the resulting efficiency.

All of this is predicted from sizes and data sheets, not measured. ``N`` ranks, ``t`` trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from babydoctor.config import RunConfig
from babydoctor.markers import markdown_table
from babydoctor.plan.costs import FLOAT32
from babydoctor.plan.hardware import ASSUMED_UTILIZATION, Hardware
from babydoctor.plan.lengths import TokenStatistics
from babydoctor.plan.memory import ALLOWANCE, FRAGMENTATION
from babydoctor.plan.model import Model
from babydoctor.plan.plan import Plan, build_plan, micro_batches_per_step, with_settings
from babydoctor.schema import UserError

SHARDED = ("fsdp", "zero2", "zero3")
STRATEGIES = ("ddp", *SHARDED)

GPU_COUNTS = (1, 4, 8, 64)

LINKS = {"NVLink": 450e9, "PCIe 4.0 x16": 32e9, "100 Gb Ethernet": 12.5e9}
"""Peak bytes per second in one direction that a rank sends through: an H100's NVLink and PCIe by NVIDIA's data sheets;
the Ethernet of a machine, which carries the traffic of a ring through all of its GPUs once."""

ASSUMED_LINK_UTILIZATION = 0.7
"""Share of a link's peak that collectives reach. An assumption, not a measurement."""

BUCKET_BYTES = 50_000_000 * FLOAT32
"""DeepSpeed's ``reduce_bucket_size`` in ``configs/accelerate/*.json``; there are two of them."""

GATHERED_LAYERS = 2
"""Decoder layers that are gathered at the same time under FSDP and ZeRO-3: the running one and the next one."""


@dataclass(frozen=True)
class RankPlan:
    """One rank of a stage.

    Attributes:
        plan: what the rank computes and holds; ``num_steps`` is that of the run.
        sent_bytes: what it sends in a step.
        single_seconds: what one GPU takes for a whole step.
    """

    strategy: str
    num_ranks: int
    plan: Plan
    sent_bytes: float
    single_seconds: float

    def seconds_per_step(self, link: str) -> float:
        """Computation plus communication. Engines hide a part of the communication behind the backward pass."""
        return self.plan.seconds_per_step + self.sent_bytes / (LINKS[link] * ASSUMED_LINK_UTILIZATION)

    def efficiency(self, link: str) -> float:
        """Speed over ``N`` times the speed of one GPU."""
        return self.single_seconds / (self.num_ranks * self.seconds_per_step(link))


def plan_ranks(
    config: RunConfig,
    hardware: Hardware,
    *,
    statistics: TokenStatistics,
    model: Model | None = None,
    utilization: float = ASSUMED_UTILIZATION,
    strategy: str = "ddp",
    num_ranks: int = 1,
) -> RankPlan:
    """Plan a stage whose steps are divided among ``num_ranks`` ranks.

    Raises:
        UserError: the strategy is not known or cannot shard the optimizer, or a step has fewer samples than ranks.
    """
    if strategy not in (*STRATEGIES, "one"):
        raise UserError(f"--strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")
    if num_ranks > config.train.batch_size:
        raise UserError(
            f"{num_ranks} GPUs share the {config.train.batch_size} samples of a step; raise train.batch_size or use "
            "fewer GPUs"
        )
    if strategy in SHARDED and num_ranks > 1 and config.train.optimizer != "adamw":
        raise UserError(f"{strategy} cannot shard train.optimizer={config.train.optimizer}; set train.optimizer=adamw")
    plan_stage = partial(build_plan, hardware=hardware, statistics=statistics, model=model, utilization=utilization)
    single = plan_stage(config)
    if num_ranks == 1:
        return RankPlan(strategy, 1, single, 0.0, single.seconds_per_step)
    own = with_settings(config, "train", batch_size=math.ceil(config.train.batch_size / num_ranks))
    plan = plan_stage(own)
    number = micro_batches_per_step(own, plan.statistics, plan.micro_batch_tokens)
    memory = _memory_per_rank(plan, strategy, num_ranks, number)
    plan = replace(plan, memory=memory, num_steps=single.num_steps)
    sent = _sent_per_step(plan.model, strategy, num_ranks, number)
    return RankPlan(strategy, num_ranks, plan, sent, single.seconds_per_step)


def _memory_per_rank(plan: Plan, strategy: str, num_ranks: int, num_micro_batches: int) -> dict[str, int]:
    memory, model = dict(plan.memory), plan.model
    trained = FLOAT32 * model.trainable
    if strategy == "ddp":
        return memory
    memory["optimizer state"] = memory["optimizer state"] // num_ranks
    if strategy != "fsdp":  # DeepSpeed steps on a flat copy of its share and sums gradients into flat buckets
        memory["flat copy of trained parameters"] = trained // num_ranks
        memory["gradients (float32)"] = trained // num_ranks + 2 * min(BUCKET_BYTES, trained)
    elif num_micro_batches == 1:
        memory["gradients (float32)"] = trained // num_ranks
    if strategy != "zero2":
        for part, size in model.weights.items():
            if not _stays_whole(part, strategy):
                memory[part] = size // num_ranks
        memory["gathered weights"] = round(_gathered_bytes(model, strategy))
    if plan.hardware.is_cuda:
        tensors = sum(size for part, size in memory.items() if not part.endswith(ALLOWANCE))
        memory[f"fragmentation {ALLOWANCE}"] = round(FRAGMENTATION * tensors)
    return memory


def _stays_whole(part: str, strategy: str) -> bool:
    """FSDP2 would lose the scales of 4-bit weights, so every rank holds those whole."""
    return strategy == "fsdp" and "NF4" in part


def _layer_bytes(model: Model, strategy: str) -> float:
    """Bytes of all decoder layers that are gathered for each pass."""
    parts = ("decoder layers", "LoRA")
    sizes = [s for part, s in model.weights.items() if part.startswith(parts) and not _stays_whole(part, strategy)]
    return sum(sizes)


def _root_bytes(model: Model) -> float:
    """Bytes of embeddings, output layer, vision tower and projector."""
    return sum(size for part, size in model.weights.items() if not part.startswith(("decoder layers", "LoRA")))


def _gathered_bytes(model: Model, strategy: str) -> float:
    layers = _layer_bytes(model, strategy) * GATHERED_LAYERS / model.shape.num_layers
    return layers + (_root_bytes(model) if strategy == "fsdp" else 0)  # FSDP2 keeps the root until the step's end


def _sent_per_step(model: Model, strategy: str, num_ranks: int, num_micro_batches: int) -> float:
    """Bytes one rank sends: reducing ``b`` bytes to shares, or gathering them from shares, takes ``b (N - 1) / N``."""
    trained = FLOAT32 * model.trainable
    if strategy == "ddp":
        passes = 2.0 * trained
    elif strategy == "zero2":  # gradients after each micro-batch, updated parameters once
        passes = trained * (num_micro_batches + 1.0)
    else:  # weights for each forward and backward pass
        layers, root = _layer_bytes(model, strategy), _root_bytes(model)
        gathered = 2 * layers + (root if strategy == "fsdp" else 2 * root)
        reductions = 1 if strategy == "fsdp" else num_micro_batches
        passes = gathered * num_micro_batches + trained * reductions
    return passes * (num_ranks - 1) / num_ranks


def format_ranks(plans: Sequence[RankPlan]) -> str:
    """A Markdown table of the same stage and strategy on several numbers of GPUs."""
    first = plans[0].plan
    gib = 2**30
    head = ("GPUs", "memory per GPU, GiB", "sent per GPU and step, GB", *(f"efficiency, {link}" for link in LINKS))
    rows = []
    for item in plans:
        fits = "" if item.plan.fits else " (does not fit)"
        efficiencies = [f"{item.efficiency(link):.0%}" for link in LINKS]
        memory = f"{item.plan.total_bytes / gib:.1f}{fits}"
        rows.append((str(item.num_ranks), memory, f"{item.sent_bytes / 1e9:.2f}", *efficiencies))
    note = (
        f"{first.name} on {first.hardware.name} with {plans[-1].strategy}, predicted, not measured: links at "
        f"{ASSUMED_LINK_UTILIZATION:.0%} of their peak, nothing hidden behind computation, GPUs at "
        f"{first.utilization:.0%} of theirs; a step always takes the same samples:"
    )
    return "\n".join([note, "", *markdown_table(head, rows)])
