"""Memory and time of a run before it starts: ``babydoctor plan``, and the check at the start of ``babydoctor train``.

The model is built on the meta device, shapes without memory, so that a 7B plan takes seconds and megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from babydoctor.config import RunConfig
from babydoctor.model.adapters import add_lora, build_language_model, is_decoder_linear, load_language_config
from babydoctor.model.checkpoint import read_manifest, resolve
from babydoctor.model.projector import build_projector
from babydoctor.model.vision import num_patches
from babydoctor.schema import UserError
from babydoctor.train import costs
from babydoctor.train.costs import Architecture, Flops, Work
from babydoctor.train.hardware import Hardware
from babydoctor.train.statistics import TokenStatistics

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

LLAMA_2_7B = "meta-llama/Llama-2-7b-chat-hf"
CLIP_L_14 = "openai/clip-vit-large-patch14"

_KNOWN_LLAMAS: dict[str, dict[str, int]] = {
    "meta-llama/Llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "meta-llama/Llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_KNOWN_CLIPS: dict[str, dict[str, int]] = {
    CLIP_L_14: {**_CLIP_L, "image_size": 224, "patch_size": 14},
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336, "patch_size": 14},
}
"""Sizes of the hub's models, so that a plan needs no download. Source: their config.json."""


@dataclass(frozen=True)
class Model:
    """What the planner needs to know of a model: its sizes and the bytes of its weights by part."""

    shape: Architecture
    weights: dict[str, int]
    trainable: int
    """Number of trained parameters."""
    dequantized_bytes: int
    """Float size of what is stored in 4 bits, written anew in each pass; 0 without quantisation."""
    note: str = ""


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


def describe_model(config: RunConfig, configs: tuple[Any, Any] | None = None) -> Model:
    """Sizes and weights of a stage's model, counted on the meta device.

    Args:
        configs: transformers' configurations of language model and tower; None: as the stage names them.

    Raises:
        UserError: the base models are neither here nor known by name.
    """
    language, vision, note = (*configs, "") if configs else _base_configs(config)
    dtype = getattr(torch, config.model.dtype)
    element = dtype.itemsize
    language_model = build_language_model(language, dtype)
    linears = {name: m for name, m in language_model.named_modules() if is_decoder_linear(name, m)}
    in_linears = sum(m.weight.numel() for m in linears.values())
    in_all = sum(p.numel() for p in language_model.parameters())
    is_4bit = config.model.quantization == "nf4"
    weights = {
        "decoder layers " + ("(NF4)" if is_4bit else f"({config.model.dtype})"): (
            nf4_bytes(in_linears, len(linears), config.model.double_quantization) if is_4bit else in_linears * element
        ),
        "embeddings, norms, output layer": (in_all - in_linears) * element,
    }
    in_lora = 0
    if config.lora is not None:
        with torch.device("meta"):
            add_lora(language_model, config.lora)
        in_lora = sum(p.numel() for name, p in language_model.named_parameters() if "lora_" in name)
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        tower = CLIPVisionModel(vision)
        projector = build_projector(_projector_kind(config), vision.hidden_size, language.hidden_size)
    weights["vision tower"] = sum(p.numel() for p in tower.parameters()) * element
    in_projector = sum(p.numel() for p in projector.parameters())
    trains_projector = "projector" in config.trainable
    weights["projector"] = in_projector * (4 if trains_projector else element)
    if in_lora:
        weights["LoRA (float32)"] = in_lora * 4
    shape = _architecture(config, language, vision, in_projector)
    trainable = in_lora + (in_projector if trains_projector else 0)
    return Model(shape, weights, trainable, in_linears * element if is_4bit else 0, note)


def nf4_bytes(numel: int, num_layers: int, double: bool) -> int:
    """Bytes of 4-bit weights: half a byte each, and a scale for every block of 64.

    Scales are float32, or with double quantisation one byte each, in blocks of 256 with a float32 scale; then each
    layer also holds a table of 256 float32 and an offset. Every layer has the 16 float32 of the NF4 code.
    """
    blocks = numel / 64
    scales = blocks + blocks / 256 * 4 + num_layers * (256 * 4 + 4) if double else blocks * 4
    return round(numel / 2 + scales + num_layers * 16 * 4)


def _projector_kind(config: RunConfig) -> str:
    if config.init_from is not None and (Path(config.init_from) / "manifest.json").is_file():
        return read_manifest(config.init_from).projector
    return config.model.projector


def _base_configs(config: RunConfig) -> tuple[Any, Any, str]:
    """Configurations of language model and tower, and a note where something had to be assumed."""
    language, vision, note = base_models(config)
    return _llama_config(language), _clip_config(vision), note


def base_models(config: RunConfig) -> tuple[str, str, str]:
    """Where language model and tower are, and a note where something had to be assumed."""
    language, vision, note = config.model.language_model, config.model.vision_tower, ""
    if config.init_from is not None:
        start = Path(config.init_from)
        if (start / "manifest.json").is_file():
            manifest = read_manifest(start)
            language = resolve(start, manifest.language_model)
            vision = resolve(start, manifest.vision_tower)
        elif language is None or vision is None:
            note = f"init_from={config.init_from} is not there yet: planned for {LLAMA_2_7B} and {CLIP_L_14}"
            language, vision = language or LLAMA_2_7B, vision or CLIP_L_14
    assert language is not None and vision is not None
    return language, vision, note


def _llama_config(reference: str) -> Any:
    from transformers import LlamaConfig

    if not Path(reference).is_dir():
        for name, sizes in _KNOWN_LLAMAS.items():
            if reference.startswith(name):
                return LlamaConfig(**sizes)  # type: ignore[arg-type]
    return load_language_config(reference)


def _clip_config(reference: str) -> Any:
    from transformers import AutoConfig, CLIPVisionConfig

    if not Path(reference).is_dir() and reference in _KNOWN_CLIPS:
        return CLIPVisionConfig(**_KNOWN_CLIPS[reference])  # type: ignore[arg-type]
    try:
        config = AutoConfig.from_pretrained(reference)
    except (OSError, ValueError) as error:
        raise UserError(f"no vision tower could be read from {reference!r}: {error}") from error
    return getattr(config, "vision_config", config)


def _architecture(config: RunConfig, language: Any, vision: Any, in_projector: int) -> Architecture:
    head_dim = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    lora = config.lora
    return Architecture(
        num_layers=language.num_hidden_layers,
        width=language.hidden_size,
        kv_width=language.num_key_value_heads * head_dim,
        intermediate=language.intermediate_size,
        num_heads=language.num_attention_heads,
        vocabulary=language.vocab_size,
        vision_width=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers + 1 + config.model.vision_layer,
        num_patches=num_patches(vision),
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        projector_parameters=in_projector,
        dtype_bytes=getattr(torch, config.model.dtype).itemsize,
        is_4bit=config.model.quantization == "nf4",
        lora_rank=lora.r if lora else 0,
        lora_dropout=bool(lora and lora.dropout),
        lora_modules=frozenset(lora.target_modules) if lora else frozenset(),
        trains_projector="projector" in config.trainable,
    )
