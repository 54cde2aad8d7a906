"""LoRA: read saved adapters, merge them into weights, and inject LoRA layers for training or inference.

Only the linear layers of the language model's decoder get a LoRA.

Source: LoRA (Hu et al. 2021). Adapters are read and written in peft's format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from babydoctor.config import LoraConfig
from babydoctor.model.families import LanguageModel
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.model.weights import load_pickle
from babydoctor.schema import UserError

PEFT_PREFIX = "base_model.model."
"""The prefix that peft adds to module names in an adapter file."""


class LoraUpdate:
    """The update of a saved LoRA: ``scale * B @ A`` for each of its modules.

    Raises:
        UserError: the directory is not a plain LoRA (DoRA, biases and extra trained modules cannot be merged).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory)
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_adapter_weights(self.directory).items():
            match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key.removeprefix(PEFT_PREFIX))
            if match is None:
                raise UserError(
                    f"{self.directory}: {key!r} is not a LoRA weight and cannot be merged; use a plain LoRA"
                )
            self.weights.setdefault(match[1], {})[match[2]] = value

    def check_fits(self, shapes: Mapping[str, Collection[int]]) -> None:
        """Check that the adapter fits the base, before anything is computed.

        Args:
            shapes: the shape ``(out, in)`` of each weight of the base by its full name, which ends in ``.weight``.

        Raises:
            UserError: a module is not in the base, lacks A or B, or has another shape.
        """
        for module, sides in self.weights.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                raise UserError(
                    f"{self.directory}: the base has no module {module!r} to merge into; use the adapter's own base"
                )
            if missing := {"A", "B"} - set(sides):
                raise UserError(
                    f"{self.directory}: {module!r} has no lora_{min(missing)} weight; copy the complete adapter"
                )
            low, high = sides["A"], sides["B"]
            if (len(high), low.shape[1]) != tuple(shape) or high.shape[1] != len(low):
                raise UserError(
                    f"{self.directory}: the update of {module!r} does not fit {tuple(shape)}; use the adapter's base"
                )

    def apply(self, module_name: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` plus the update in float32, or ``weight`` itself if the adapter has no update for it."""
        factors = self.factors(module_name, weight.device)
        return weight if factors is None else torch.addmm(weight.float(), factors[1], factors[0])

    def factors(self, module_name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``A`` ``[r, in]`` and scaled ``B`` ``[out, r]`` of a module in float32; None if there is no update for it."""
        pair = self.weights.get(module_name)
        if pair is None:
            return None
        low, high = (pair[side].to(device, torch.float32) for side in "AB")
        return low, high * self.scale(module_name, low.shape[0])

    def scale(self, module_name: str, rank: int) -> float:
        """alpha / r (alpha / sqrt(r) for rank-stabilized LoRA), with peft's per-module patterns."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})$", module_name):
                alpha = value
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def read_adapter_config(directory: Path) -> dict:
    """Read peft's ``adapter_config.json``.

    Raises:
        UserError: it is missing or damaged, or does not describe a plain LoRA.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a peft adapter: it has no adapter_config.json; copy the complete adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the adapter again") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={config.get('peft_type')!r}; only LORA is supported")
    for key, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False)):
        if config.get(key, plain) not in (plain, []):
            raise UserError(f"{path}: {key}={config[key]!r} is not supported; only {plain!r} is supported")
    return config


def load_adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a peft adapter from safetensors, or with ``weights_only`` from ``adapter_model.bin``."""
    if (directory / "adapter_model.safetensors").is_file():
        return load_tensors(directory / "adapter_model.safetensors")
    if (directory / "adapter_model.bin").is_file():
        return dict(load_pickle(directory / "adapter_model.bin"))
    raise UserError(
        f"{directory} holds neither adapter_model.safetensors nor adapter_model.bin; copy the complete adapter"
    )


def add_lora(model: LanguageModel, lora: LoraConfig) -> None:
    """Inject fresh LoRA layers (float32, B = 0) into the decoder's linear layers."""
    import peft

    _check_targets(model, lora.target_modules)
    _inject(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=rf"model\.layers\.\d+\..*\.({'|'.join(lora.target_modules)})",
            task_type="CAUSAL_LM",
        ),
    )


def load_lora(model: LanguageModel, directory: Path, *, trainable: bool = False) -> None:
    """Inject LoRA layers and load their weights from a peft adapter.

    Raises:
        UserError: its modules or shapes do not fit the model.
    """
    import peft

    read_adapter_config(directory)
    config = peft.LoraConfig.from_pretrained(str(directory))
    try:
        _inject(model, config)
    except ValueError as error:
        raise UserError(f"{directory} does not fit the language model: {error}") from error
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in load_adapter_weights(directory).items()}
    try:
        result: Any = peft.set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        raise UserError(f"{directory} does not fit the language model: {error}") from error
    if result.unexpected_keys:
        raise UserError(
            f"{directory}: the language model has no layer for {result.unexpected_keys[0]!r}; use the adapter's base"
        )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)
            if not trainable:
                parameter.data = parameter.data.to(model.dtype)


def save_lora(
    model: LanguageModel, directory: Path, base: str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the injected LoRA so that ``peft.PeftModel.from_pretrained(base_model, directory)`` loads it.

    Args:
        weights: the LoRA's weights by their names in ``model``; None: those that the model holds.
    """
    import peft

    directory.mkdir(parents=True, exist_ok=True)
    state = {
        PEFT_PREFIX + name: value.detach().contiguous().cpu()
        for name, value in peft.get_peft_model_state_dict(model, state_dict=weights).items()
    }
    save_tensors(state, directory / "adapter_model.safetensors")
    config = lora_config(model)
    values = config.to_dict()
    values.update(base_model_name_or_path=base, inference_mode=True)
    values["target_modules"] = sorted({name.rsplit(".", 3)[-3] for name in state})
    text = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}, indent=2, default=str)
    (directory / "adapter_config.json").write_text(text + "\n")


def has_lora(model: LanguageModel) -> bool:
    """True if ``add_lora`` or ``load_lora`` has injected LoRA layers."""
    return bool(getattr(model, "peft_config", None))


def lora_config(model: LanguageModel) -> Any:
    """Return peft's configuration of the injected LoRA."""
    return model.peft_config["default"]


def lora_layers(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Yield each peft LoRA layer with its name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _inject(model: LanguageModel, config: Any) -> None:
    import peft

    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for name, module in lora_layers(model):
        assert name.startswith("model.layers."), f"LoRA reached {name}"
        # Training casts the float32 LoRA weights down to the base's dtype. peft would cast the input up instead.
        module.cast_input_dtype_enabled = False


def _check_targets(model: LanguageModel, targets: Sequence[str]) -> None:
    known = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if re.match(r"model\.layers\.\d+\.", name) and hasattr(module, "weight") and "norm" not in name
    }
    unknown = sorted(set(targets) - known)
    if unknown:
        raise UserError(f"lora.target_modules names {unknown}; this language model has {sorted(known)}")
