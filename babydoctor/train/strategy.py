"""Start the engine that accelerate's configuration chooses, after checking that this program supports it.

======== ============================================ =========================================
name     accelerate's configuration                   what each rank holds
======== ============================================ =========================================
``one``  one process                                  everything
``ddp``  ``multi_gpu.yaml``, ``multi_node.yaml``      everything
``zero2`` ``deepspeed_zero2.yaml``                    all weights, a share of the optimizer's state
``zero3`` ``deepspeed_zero3.yaml``                    a share of the weights and of the optimizer's state
``fsdp`` ``fsdp.yaml``                                a share of the weights and of the optimizer's state
======== ============================================ =========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from transformers.integrations import unset_hf_deepspeed_config

from babydoctor.config import TrainConfig
from babydoctor.schema import UserError

DECODER_LAYERS = tuple(f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
"""transformers' decoder layers. Configurations may name any of them; ``Trainee`` wraps those of the model."""


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Join the other ranks and start the engine that ``accelerate launch`` or ``torchrun`` set in the environment.

    Raises:
        UserError: accelerate's configuration contradicts the training settings or asks for what is not supported.
    """
    _check_deepspeed_is_installed()
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(device_placement=False, kwargs_handlers=[ddp])
    _choose_on_cpu(accelerator)
    problems = list(_find_problems(accelerator, config))
    if problems:
        raise UserError(
            "accelerate's configuration does not fit:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    _configure_deepspeed(accelerator, config)
    return accelerator


def strategy_of(accelerator: Accelerator) -> str:
    """``one``, ``ddp``, ``fsdp``, ``zero2`` or ``zero3``."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "ddp" if accelerator.num_processes > 1 else "one"


def _check_deepspeed_is_installed() -> None:
    from accelerate.utils import is_deepspeed_available

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not is_deepspeed_available():
        raise UserError(
            "accelerate's configuration asks for DeepSpeed, which is not installed; run `pip install "
            "'babydoctor[deepspeed]'`, or use configs/accelerate/fsdp.yaml"
        )


def _choose_on_cpu(accelerator: Accelerator) -> None:
    """Choose FSDP or DeepSpeed on CPU ranks too, where both work but accelerate ignores them."""
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    state: Any = accelerator.state
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.deepspeed_plugins.select(_from_accelerator_state=True)
        state.distributed_type = DistributedType.DEEPSPEED
    PartialState().distributed_type = state.distributed_type


def _find_problems(accelerator: Accelerator, config: TrainConfig) -> Iterator[str]:
    kind = accelerator.distributed_type
    wanted = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
    for flag, engine in wanted.items():
        if parse_flag_from_env(flag) and kind != engine:
            yield f"it asks for {engine.value}, and this process was started alone; start it with accelerate launch"
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, *wanted.values())
    if kind not in known:
        yield f"distributed_type: {kind.value} is not supported; use MULTI_GPU, FSDP or DEEPSPEED"
    if accelerator.mixed_precision != "no":
        yield f'mixed_precision: {accelerator.mixed_precision}; set "no": model.dtype decides the precision'
    if accelerator.gradient_accumulation_steps != 1:
        yield "gradient_accumulation_steps is set; leave it out: train.micro_batch_tokens decides the micro-batches"
    if accelerator.state.dynamo_plugin.backend != "NO":
        yield "dynamo_config is set; leave it out: train.fuse decides what is compiled"
    if accelerator.parallelism_config is not None:
        yield "parallelism_config is set; tensor, context and sequence parallelism are not supported"
    if kind == DistributedType.FSDP:
        yield from fsdp_problems(accelerator.state.fsdp_plugin)
    if kind == DistributedType.DEEPSPEED:
        yield from deepspeed_problems(accelerator.state.deepspeed_plugin, config)
    if kind in wanted.values() and config.optimizer != "adamw":
        yield f"train.optimizer={config.optimizer} cannot be sharded; set train.optimizer=adamw"


def fsdp_problems(plugin: Any) -> Iterator[str]:
    """Settings of a ``FullyShardedDataParallelPlugin`` that are not supported, each with its fix."""
    if plugin.fsdp_version != 2:
        yield f"fsdp_version: {plugin.fsdp_version}; set 2"
        return
    from torch.distributed.fsdp import CPUOffloadPolicy

    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        yield "fsdp_offload_params: true is not supported; set false"
    if plugin.activation_checkpointing:
        yield "fsdp_activation_checkpointing: true; set false: train.gradient_checkpointing decides it"
    if plugin.cpu_ram_efficient_loading:
        yield "fsdp_cpu_ram_efficient_loading: true is not supported; set false"
    if plugin.transformer_cls_names_to_wrap not in (None, *([name] for name in DECODER_LAYERS)):
        yield f"fsdp_transformer_layer_cls_to_wrap must be one of {', '.join(DECODER_LAYERS)}; they mean the same here"


def deepspeed_problems(plugin: Any, config: TrainConfig) -> Iterator[str]:
    """Settings of a ``DeepSpeedPlugin`` that are not supported, each with its fix."""
    settings: dict[str, Any] = plugin.deepspeed_config
    zero = settings.get("zero_optimization", {})
    if plugin.zero_stage not in (2, 3):
        yield f"zero_optimization.stage: {plugin.zero_stage}; set 2 or 3, or use multi_gpu.yaml"
    for key in ("bf16", "fp16"):
        if settings.get(key, {}).get("enabled") not in (None, False, "auto"):
            yield f"{key}.enabled: true would also round the trained parameters; remove it: model.dtype decides"
    for key in ("optimizer", "scheduler"):
        if key in settings:
            yield f"{key} is set; remove it: train.* decides it"
    for key in ("offload_optimizer", "offload_param"):
        if zero.get(key, {}).get("device", "none") != "none":
            yield f"zero_optimization.{key} is not supported; remove it"
    if settings.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        yield "gradient_accumulation_steps must be 1: train.micro_batch_tokens decides the micro-batches"
    if settings.get("gradient_clipping", "auto") not in ("auto", config.max_grad_norm):
        yield "gradient_clipping differs from train.max_grad_norm; set it to auto"


def _configure_deepspeed(accelerator: Accelerator, config: TrainConfig) -> None:
    """Set the clipping norm, which DeepSpeed needs in advance because it clips inside its backward pass."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    # Without this, transformers would shard the weights while it builds a model. They are sharded after loading.
    unset_hf_deepspeed_config()
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings.update(
        gradient_clipping=config.max_grad_norm,
        gradient_accumulation_steps=1,
        train_micro_batch_size_per_gpu=1,  # DeepSpeed uses it only to count samples
        zero_allow_untested_optimizer=True,
    )
