"""The configuration of one training stage: a YAML file plus ``key=value`` overrides.

Strict and frozen: an unknown key or a wrong value is an error that names the key, the value and the mend. All
defaults of a run stand here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from babydoctor.conversation import TEMPLATES
from babydoctor.schema import UserError

LLAMA_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(_Section):
    """What the model is made of. ``language_model`` and ``vision_tower`` are directories or hub ids."""

    language_model: str | None = Field(None, description="LLaMA in transformers' format; null: as in init_from")
    vision_tower: str | None = Field(None, description="CLIP in transformers' format; null: as in init_from")
    projector: Literal["linear", "mlp2x_gelu"] = Field("linear", description="mlp2x_gelu is LLaVA-1.5's")
    vision_layer: int = Field(-2, lt=0, description="hidden layer of the tower that the projector reads")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of frozen weights and of computation")
    quantization: Literal["none", "nf4"] = Field("none", description="of the language model's linear layers")
    double_quantization: bool = Field(True, description="quantise NF4's scales too (QLoRA, section 3)")


class LoraConfig(_Section):
    """A low-rank adapter on the language model's linear layers (never on lm_head, projector or tower)."""

    r: int = Field(128, gt=0)
    alpha: float = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = LLAMA_LINEAR_LAYERS


class DataConfig(_Section):
    """Where rows and images are and how they become tokens and pixels."""

    rows: tuple[str, ...] = Field(description="LLaVA JSON, JSONL, a datasets directory or hub id; several are joined")
    images: str | None = Field(None, description="folder of the images; null: they are embedded in the rows")
    template: str = "llava_llama_2"
    image_mode: Literal["square", "pad"] = Field("pad", description="square crops as CLIP does; pad loses nothing")
    max_length: int = Field(2048, gt=0, description="longest sample in positions, image slots counted")
    on_bad: Literal["refuse", "quarantine"] = "refuse"
    eval_rows: tuple[str, ...] = Field((), description="held-out rows for the loss at intervals")
    eval_images: str | None = Field(None, description="null: as images")
    eval_limit: int = Field(256, gt=0, description="take at most so many held-out rows")
    num_workers: int = Field(2, ge=0, description="processes that read images; 0: the training process itself")

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = {k: [v] if k in ("rows", "eval_rows") and isinstance(v, str) else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _template_exists(self) -> DataConfig:
        if self.template not in TEMPLATES:
            raise ValueError(f"template={self.template!r} is not one of {', '.join(TEMPLATES)}")
        return self


class TrainConfig(_Section):
    """Optimisation. One step takes ``batch_size`` samples, whatever the micro-batches and the number of GPUs."""

    batch_size: int = Field(128, gt=0, description="samples per optimiser step, over all ranks")
    micro_batch_tokens: int | Literal["auto"] = Field(4096, description="positions per forward pass; auto: as planned")
    epochs: int = Field(1, gt=0)
    max_steps: int | None = Field(None, gt=0, description="stop after so many steps; null: after the epochs")
    learning_rate: float = Field(2e-4, gt=0)
    projector_learning_rate: float | None = Field(None, gt=0, description="null: as learning_rate")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    gradient_checkpointing: str = Field("none", description="none, full, every:K (one layer in K), or auto")
    compile: bool = Field(False, description="torch.compile each decoder layer")
    fuse: Literal["auto"] | bool = Field(
        "auto", description="compile elementwise operations into kernels; auto: on the CPU, from 256 wide on"
    )
    share_prefix: bool = Field(True, description="compute what all samples begin with (system prompt) once a batch")
    seed: int = 42
    log_every: int = Field(1, gt=0)
    eval_every: int = Field(0, ge=0, description="steps between held-out losses and sample answers; 0: at the end")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = Field(2, gt=0)
    num_sample_answers: int = Field(3, ge=0)

    @property
    def shares_prefix(self) -> bool:
        """Compiled layers are transformers' own, which know no prefix."""
        return self.share_prefix and not self.compile

    @model_validator(mode="after")
    def _checkpointing_is_known(self) -> TrainConfig:
        if not re.fullmatch(r"none|full|auto|every:[1-9]\d*", self.gradient_checkpointing):
            raise ValueError(
                f"gradient_checkpointing={self.gradient_checkpointing!r} is not none, full, every:K or auto"
            )
        if isinstance(self.micro_batch_tokens, int) and self.micro_batch_tokens <= 0:
            raise ValueError(f"micro_batch_tokens={self.micro_batch_tokens} must be positive or auto")
        return self


class EvalTaskConfig(_Section):
    """A task of ``babydoctor eval`` that training puts to the model at intervals; see ``eval/tasks.py``."""

    task: str = Field(description="vqa-rad, slake, path-vqa, vqa-med, roco, phantom or rows")
    data: str = Field(description="folder or file of the questions, or hub")
    images: str | None = Field(None, description="folder of the images; null: beside the data")
    split: str | None = Field(None, description="part of the data; null: the format's default")
    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0: at the end")
    max_questions: int = Field(200, ge=0, description="ask only the first so many; 0: all")
    images_as: tuple[str, ...] = Field(("right",), description="image conditions: right, shuffled, blank, noise")
    batch_size: int = Field(8, gt=0, description="questions answered at the same time")


class TrackingConfig(_Section):
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = Field(None, description="null: no wandb")


class RunConfig(_Section):
    """One stage. The stages differ in these values only; no code asks which stage it is."""

    name: str
    output_dir: str
    init_from: str | None = Field(None, description="run directory of the stage before; its adapter is merged")
    model: ModelConfig = ModelConfig()
    trainable: tuple[Literal["projector"], ...] = ("projector",)
    lora: LoraConfig | None = None
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalTaskConfig | None = None
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _is_whole(self) -> RunConfig:
        if not self.trainable and self.lora is None:
            raise ValueError("nothing would train: set trainable: [projector] or lora: {...}")
        if self.init_from is None and not (self.model.language_model and self.model.vision_tower):
            raise ValueError("model.language_model and model.vision_tower are needed where init_from is not set")
        tokens = self.train.micro_batch_tokens
        if isinstance(tokens, int) and tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens={tokens} is below data.max_length={self.data.max_length}, "
                "so the longest sample would not fit; raise the one or lower the other"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``key=value`` overrides (``train.batch_size=64``; values are YAML).

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no configuration file {path}; the repo's own are in configs/") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return build_config(values, source=str(path))


def build_config(values: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Validate a nested dictionary of settings."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join([f"{source} has {error.error_count()} mistake(s):", *_explain(error)])) from None


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Each setting in which two configurations differ, as ``key: old -> new``."""
    old_values, new_values = dict(_flatten(old.model_dump())), dict(_flatten(new.model_dump()))
    return [
        f"{key}: {old_values.get(key)} -> {new_values.get(key)}"
        for key in sorted(old_values.keys() | new_values.keys())
        if old_values.get(key) != new_values.get(key)
    ]


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every key with its full dotted name."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in nested settings that are not validated yet; the key must be known."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is not an override; write key=value, for example train.batch_size=64")
    if key not in known_keys():
        raise UserError(f"{override!r}: {_unknown(key)}")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
    values[last] = read_value(text)


def read_value(text: str) -> Any:
    """The value of a ``key=value`` override. YAML 1.1 would read 2e-4 as a string; it is a number here."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", text, re.I) else yaml.safe_load(text)


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"  {_unknown(key)}")
        elif item["type"] == "missing":
            lines.append(f"  the key {key!r} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], dict | BaseModel) else f", got {item['input']!r}"
            lines.append(f"  {key + ': ' if key else ''}{message}{given}")
    return lines


def _unknown(key: str) -> str:
    keys = known_keys()
    last = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    near = difflib.get_close_matches(key, keys, n=1) or [
        last[name] for name in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)
    ]
    return f"there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
