"""The configuration of one training stage: a YAML file plus ``key=value`` overrides.

The schema is strict and immutable: an unknown key or a wrong value is an error that names the key, the value and the
fix. All defaults of a run are defined here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from babydoctor import config_file
from babydoctor.config_file import Section, load, validate
from babydoctor.conversation import TEMPLATES

LLAMA_LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelConfig(Section):
    """What the model consists of."""

    language_model: str | None = Field(
        None,
        description="folder or hub id of a LLaMA, Mistral, Qwen2 or Qwen3; null: that of init_from",
    )
    vision_tower: str | None = Field(None, description="folder or hub id of a CLIP or SigLIP; null: that of init_from")
    projector: Literal["linear", "mlp2x_gelu"] = Field(
        "linear", description="kind of projector; mlp2x_gelu is that of LLaVA-1.5"
    )
    vision_layer: int = Field(-2, lt=0, description="hidden layer of the tower that the projector reads")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="data type of the frozen weights and of the computation"
    )
    quantization: Literal["none", "nf4"] = Field("none", description="precision of the language model's linear layers")
    double_quantization: bool = Field(True, description="also quantize NF4's scales (QLoRA, section 3)")


class LoraConfig(Section):
    """A low-rank adapter on the linear layers of the language model's decoder."""

    r: int = Field(128, gt=0, description="rank")
    alpha: float = Field(256, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout probability of the adapter's input")
    target_modules: tuple[str, ...] = Field(LLAMA_LINEAR_LAYERS, description="linear layers that get an adapter")


class DataConfig(Section):
    """Where rows and images are and how they become tokens and pixels."""

    rows: tuple[str, ...] = Field(
        description="converted folder, JSON, JSONL, parquet, .tar, hub id or URL; several are joined"
    )
    images: str | None = Field(None, description="folder of the images; null: they are embedded in the rows")
    template: str = Field("llava_llama_2", description=f"conversation template: {', '.join(TEMPLATES)}")
    image_mode: Literal["square", "pad"] = Field(
        "pad", description="square: crop as CLIP does; pad: keep the whole image"
    )
    max_length: int = Field(2048, gt=0, description="longest sample in tokens, image slots included")
    on_bad: Literal["refuse", "quarantine"] = Field(
        "refuse", description="what happens to bad rows: refuse stops the run, quarantine lists them in bad.jsonl"
    )
    eval_rows: tuple[str, ...] = Field((), description="held-out rows for the loss during training")
    eval_images: str | None = Field(None, description="folder of the held-out images; null: data.images")
    eval_limit: int = Field(256, gt=0, description="largest number of held-out rows to use")
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


class TrainConfig(Section):
    """Optimization. One step takes ``batch_size`` samples, however many micro-batches and GPUs there are."""

    batch_size: int = Field(128, gt=0, description="samples per optimizer step, over all ranks")
    micro_batch_tokens: int | Literal["auto"] = Field(
        4096, description="most tokens per forward pass; auto: as many as the plan finds to fit"
    )
    epochs: int = Field(1, gt=0, description="passes over the rows")
    max_steps: int | None = Field(None, gt=0, description="stop after this many steps; null: after the epochs")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    projector_learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate of the projector; null: train.learning_rate"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="paged_adamw_8bit (bitsandbytes) takes a quarter of adamw's memory"
    )
    gradient_checkpointing: str = Field(
        "none", description="layers to recompute in the backward pass: none, full, every:K (one in K), or auto"
    )
    compile: bool = Field(False, description="torch.compile each decoder layer")
    fuse: Literal["auto"] | bool = Field(
        "auto", description="fuse elementwise operations into kernels; auto: for hidden sizes of 256 or more"
    )
    share_prefix: bool = Field(
        True, description="compute the shared prefix of all samples (system prompt) once per micro-batch"
    )
    seed: int = Field(42, description="seed of initialization, sampling order and dropout")
    log_every: int = Field(1, gt=0, description="steps between lines of the log")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses and sample answers; 0: at the end")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = Field(2, gt=0, description="number of newest checkpoints to keep on disk")
    num_sample_answers: int = Field(3, ge=0, description="held-out rows whose answers are logged")

    @property
    def shares_prefix(self) -> bool:
        """False with ``compile``, because compiled layers are those of transformers, which support no shared prefix."""
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


class TaskConfig(Section):
    """An evaluation task: which questions to ask. See ``eval/load.py``."""

    task: str = Field(description="vqa-rad, slake, path-vqa, vqa-med, roco, phantom or rows")
    data: str = Field(description="folder or file of the questions, or hub")
    images: str | None = Field(None, description="folder of the images; null: next to the data")
    split: str | None = Field(None, description="part of the data; null: the format's default")
    language: str = Field("en", description="SLAKE only: en, zh or all")
    prompt: str = Field("{question}", description="how a question is asked; {question} is replaced")
    max_questions: int = Field(0, ge=0, description="ask only this many questions, the first ones; 0: all")
    train: tuple[str, ...] = Field(
        (), description="rows (or a ROCO folder) that the model was trained on, to report leakage"
    )


class InTrainingTaskConfig(TaskConfig):
    """A task of ``babydoctor eval`` that training runs at intervals."""

    max_questions: int = Field(200, ge=0, description="ask only this many questions, the first ones; 0: all")
    every_steps: int = Field(0, ge=0, description="steps between evaluations; 0: at the end")
    images_as: tuple[str, ...] = Field(("right",), description="image conditions: right, shuffled, blank, noise")
    batch_size: int = Field(8, gt=0, description="questions answered at the same time")


class TrackingConfig(Section):
    """Where metrics are written besides metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard event files into the run")
    wandb_project: str | None = Field(None, description="project at Weights & Biases; null: wandb is not used")


class RunConfig(Section):
    """One stage. Stages differ only in these values; no code depends on which stage it is."""

    name: str = Field(description="name of the stage, in logs and in the run's lineage")
    output_dir: str = Field(description="run directory to write")
    init_from: str | None = Field(None, description="run directory of the previous stage; its adapter is merged")
    model: ModelConfig = ModelConfig()
    trainable: tuple[Literal["projector"], ...] = Field(("projector",), description="parts that train besides the LoRA")
    lora: LoraConfig | None = None
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: InTrainingTaskConfig | None = None
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _is_whole(self) -> RunConfig:
        if not self.trainable and self.lora is None:
            raise ValueError("nothing would train: set trainable: [projector] or lora: {...}")
        if self.init_from is None and not (self.model.language_model and self.model.vision_tower):
            raise ValueError("model.language_model and model.vision_tower are required unless init_from is set")
        tokens = self.train.micro_batch_tokens
        if isinstance(tokens, int) and tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens={tokens} is below data.max_length={self.data.max_length}, "
                "so the longest sample would not fit; raise the first or lower the second"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a stage's YAML file and apply ``key=value`` overrides (``train.batch_size=64``; values are YAML).

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    return load(RunConfig, path, overrides)


def build_config(values: dict[str, Any], source: str = "configuration") -> RunConfig:
    """Validate a nested dictionary of settings.

    Raises:
        UserError: a key or a value is wrong.
    """
    return validate(RunConfig, values, source)


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its key, ``train.batch_size``."""
    return dict(_flatten(config.model_dump(mode="json")))


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Each key whose values differ, with the old and the new value (None if its section is absent)."""
    old_values, new_values = flat_settings(old), flat_settings(new)
    keys = (*old_values, *(key for key in new_values if key not in old_values))
    return {
        key: (old_values.get(key), new_values.get(key)) for key in keys if old_values.get(key) != new_values.get(key)
    }


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` of a stage's configuration in nested settings that are not validated yet.

    Raises:
        UserError: the override is not ``key=value``, or the key does not exist.
    """
    config_file.apply_override(values, override, RunConfig)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
