"""The language model: streamed loading with merged LoRA and 4-bit quantisation, and new LoRA layers.

Everything here touches decoder layers of the language model only; ``lm_head``, embeddings, norms, projector and
tower are never quantised and never get a LoRA.

Source: LoRA (Hu et al. 2021), QLoRA with NF4 and double quantisation (Dettmers et al. 2023).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from babydoctor.config import LoraConfig
from babydoctor.model.packed.attention import ATTENTION_NAME, register_attention
from babydoctor.model.weights import iterate_weights, local_directory
from babydoctor.schema import UserError

PEFT_PREFIX = "base_model.model."
"""What peft writes before a module's name in an adapter file."""


@dataclass(frozen=True)
class Quantization:
    """How decoder linears are stored: NF4 blocks of 64, their scales quantised again when ``double``."""

    double: bool = True


def load_language_config(path: str | Path) -> LlamaConfig:
    """The configuration of a LLaMA.

    Raises:
        UserError: not there, or another architecture.
    """
    try:
        config = AutoConfig.from_pretrained(str(local_directory(path, weights=False)))
    except (OSError, ValueError) as error:
        raise UserError(f"no language model could be read from {str(path)!r}: {error}") from error
    if not isinstance(config, LlamaConfig):
        raise UserError(
            f"the language model {str(path)!r} is a {config.model_type!r}; BabyDoctor takes LLaMA models, "
            "for example meta-llama/Llama-2-7b-chat-hf"
        )
    return config


def build_language_model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LLaMA on the meta device: shapes only, no memory."""
    register_attention()
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
    return model.requires_grad_(False)


def load_language_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    merge_adapters: Sequence[Path] = (),
) -> LlamaForCausalLM:
    """Load a LLaMA weight by weight: read, add the merged adapters' update, cast, quantise, next.

    At no time does more than one weight exist in float beside the finished model, so a 7B model in NF4 needs its
    4-bit size and one matrix.

    Args:
        dtype: the precision that weights are rounded to (and quantised from).
        compute_dtype: the precision they are then held in; None: ``dtype``.
        merge_adapters: peft LoRA directories, merged in this order in float32 before the cast to ``dtype``.

    Raises:
        UserError: weights are missing, unknown or of the wrong shape; an adapter does not fit.
    """
    directory = local_directory(path)
    config = load_language_config(path)
    model = build_language_model(config, compute_dtype or dtype)
    updates = [LoraUpdate(adapter) for adapter in merge_adapters]
    expected = dict(model.named_parameters())
    for name, weight in iterate_weights(directory):
        if name not in expected:
            if name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight"):
                continue
            raise UserError(f"{directory} holds an unknown weight {name!r}; is it a plain LLaMA?")
        if weight.shape != expected[name].shape:
            raise UserError(
                f"{directory}: weight {name!r} has the shape {tuple(weight.shape)}, "
                f"config.json asks for {tuple(expected[name].shape)}"
            )
        weight = weight.to(device)
        for update in updates:
            weight = update.apply(name.removesuffix(".weight"), weight)
        place_weight(model, name, weight.to(dtype), quantization)
        del expected[name]
    if config.tie_word_embeddings:
        model.tie_weights()
        expected.pop("lm_head.weight", None)
    if expected:
        raise UserError(f"{directory} lacks {len(expected)} weights, the first is {next(iter(expected))!r}")
    for update in updates:
        update.check_all_used()
    return finish_language_model(model, device)


def finish_language_model(model: LlamaForCausalLM, device: str | torch.device) -> LlamaForCausalLM:
    """Give the rotary embedding its values (it has no weights in files) and switch to evaluation."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.eval().requires_grad_(False)


def place_weight(
    model: LlamaForCausalLM, name: str, weight: torch.Tensor, quantization: Quantization | None = None
) -> None:
    """Put one weight, on its device, into a model that was built on the meta device; it takes the model's dtype."""
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    weight = weight.to(model.dtype)
    if quantization and is_decoder_linear(module_name, module):
        model.set_submodule(module_name, quantize_linear(weight, quantization))
    else:
        setattr(module, parameter_name, nn.Parameter(weight, requires_grad=False))


def is_decoder_linear(name: str, module: nn.Module) -> bool:
    """Whether 4-bit and LoRA may reach this module of the language model."""
    return isinstance(module, nn.Linear) and module.bias is None and name.startswith("model.layers.")


def quantize_linear(weight: torch.Tensor, quantization: Quantization) -> nn.Module:
    """A bias-free bitsandbytes NF4 layer that holds ``weight`` ``[out, in]`` and computes in its dtype."""
    bnb = import_bitsandbytes()
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=weight.dtype,
            compress_statistics=quantization.double,
            quant_type="nf4",
        )
    packed = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=quantization.double, module=layer
    )
    layer.weight = packed.to(weight.device)  # moving it to its device quantises it
    assert layer.weight.bnb_quantized, "bitsandbytes left the weight in float"
    # On CPUs with AVX512-BF16 it would repack the weights in place at the first inference call, for a kernel that
    # rounds to bfloat16 and takes no width that is not a multiple of 32; training could not go on after that.
    layer.support_avx512bf16_for_cpu = False
    return layer


def import_bitsandbytes() -> Any:
    """bitsandbytes, or an error that says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "model.quantization=nf4 and train.optimizer=paged_adamw_8bit need bitsandbytes; "
            "install it with `pip install 'babydoctor[train]'`"
        ) from error
    return bitsandbytes


def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The float weight ``[out, in]`` of a plain or 4-bit linear layer."""
    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is None:
        return weight.data
    return import_bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)


class LoraUpdate:
    """What a saved LoRA adds to the weights: ``scale * B @ A`` a module.

    Raises:
        UserError: the directory is no plain LoRA (DoRA, biases and extra trained modules are not merged).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.config = read_adapter_config(self.directory)
        self.weights: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_adapter_weights(self.directory).items():
            match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key.removeprefix(PEFT_PREFIX))
            if match is None:
                raise UserError(f"{self.directory}: {key!r} is not a LoRA weight and cannot be merged")
            self.weights.setdefault(match[1], {})[match[2]] = value
        self._unused = set(self.weights)

    def apply(self, module_name: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` plus the update in float32, or ``weight`` itself where the adapter has none for it."""
        pair = self.weights.get(module_name)
        if pair is None:
            return weight
        low, high = (pair[side].to(weight.device, torch.float32) for side in "AB")
        if (high.shape[0], low.shape[1]) != tuple(weight.shape):
            raise UserError(f"{self.directory}: the update of {module_name!r} does not fit {tuple(weight.shape)}")
        self._unused.discard(module_name)
        return weight.float() + self.scale(module_name, low.shape[0]) * (high @ low)

    def scale(self, module_name: str, rank: int) -> float:
        """alpha / r (alpha / sqrt(r) for rank-stabilised LoRA), with peft's per-module patterns."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})$", module_name):
                alpha = value
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def check_all_used(self) -> None:
        if self._unused:
            raise UserError(f"{self.directory}: the base has no module {sorted(self._unused)[0]!r} to merge into")


def read_adapter_config(directory: Path) -> dict:
    """peft's ``adapter_config.json``, checked to be a LoRA that this code can read."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{directory} is no peft adapter: adapter_config.json is not there")
    config = json.loads(path.read_text())
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={config.get('peft_type')!r}; only LORA is supported")
    for key, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False)):
        if config.get(key, plain) not in (plain, []):
            raise UserError(f"{path}: {key}={config[key]!r} is not supported; only {plain!r} is")
    return config


def load_adapter_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a peft adapter, from safetensors or (weights only) from ``adapter_model.bin``."""
    from babydoctor.model.weights import load_pickle

    if (directory / "adapter_model.safetensors").is_file():
        return load_file(directory / "adapter_model.safetensors")
    if (directory / "adapter_model.bin").is_file():
        return dict(load_pickle(directory / "adapter_model.bin"))
    raise UserError(f"{directory} holds neither adapter_model.safetensors nor adapter_model.bin")


def add_lora(model: LlamaForCausalLM, lora: LoraConfig) -> None:
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


def load_lora(model: LlamaForCausalLM, directory: Path, *, trainable: bool = False) -> None:
    """Inject the LoRA layers of a peft adapter, made by us or elsewhere, with its weights.

    Raises:
        UserError: its modules or shapes are not the model's.
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
        raise UserError(f"{directory}: the language model has no place for {result.unexpected_keys[0]!r}")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(trainable)
            if not trainable:
                parameter.data = parameter.data.to(model.dtype)


def save_lora(model: LlamaForCausalLM, directory: Path, base: str) -> None:
    """Write the injected LoRA so that ``peft.PeftModel.from_pretrained(base_model, directory)`` loads it."""
    import peft

    directory.mkdir(parents=True, exist_ok=True)
    state = {
        PEFT_PREFIX + name: value.detach().contiguous().cpu()
        for name, value in peft.get_peft_model_state_dict(model).items()
    }
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora_config(model)
    values = config.to_dict()
    values.update(base_model_name_or_path=base, inference_mode=True)
    values["target_modules"] = sorted({name.rsplit(".", 3)[-3] for name in state})
    text = json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}, indent=2, default=str)
    (directory / "adapter_config.json").write_text(text + "\n")


def has_lora(model: LlamaForCausalLM) -> bool:
    return bool(getattr(model, "peft_config", None))


def lora_config(model: LlamaForCausalLM) -> Any:
    """peft's configuration of the injected LoRA."""
    return model.peft_config["default"]


def lora_layers(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Each peft LoRA layer with its name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def merged_weights(model: LlamaForCausalLM) -> Iterable[tuple[str, torch.Tensor]]:
    """Each weight of the plain model that equals this one, in float32: dequantised, LoRA added.

    One weight at a time, so that the merged model need not fit beside the loaded one.
    """
    loras = dict(lora_layers(model))
    linears = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    for name, module in linears.items():
        if ".lora_" in name:
            continue
        plain_name = name.removesuffix(".base_layer")
        weight = dequantized_weight(module).float()
        if plain_name in loras:
            weight = weight + loras[plain_name].get_delta_weight("default").float()
        yield plain_name + ".weight", weight


def _inject(model: LlamaForCausalLM, config: Any) -> None:
    import peft

    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for name, module in lora_layers(model):
        assert name.startswith("model.layers."), f"LoRA reached {name}"
        # Training runs under autocast, which casts the float32 LoRA weights down; peft would cast the input up.
        module.cast_input_dtype_enabled = False


def _check_targets(model: LlamaForCausalLM, targets: Sequence[str]) -> None:
    known = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if re.match(r"model\.layers\.\d+\.", name) and hasattr(module, "weight") and "norm" not in name
    }
    unknown = sorted(set(targets) - known)
    if unknown:
        raise UserError(f"lora.target_modules names {unknown}; this language model has {sorted(known)}")
