"""Gather trained parameters and optimizer state into whole tensors, and share them out again, for every engine.

So checkpoints have one format, and a run can continue with another number of ranks or another engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.train.strategy import strategy_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter besides its step count. AdamW is the only optimizer that is sharded."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP2 (``DTensor``) or ZeRO-3 shards; return any other tensor unchanged.

    All ranks must call it.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def gather(parameters: Iterable[tuple[str, nn.Parameter]], *, keep: bool) -> dict[str, torch.Tensor]:
    """Gather parameters one at a time and return them by name, on the CPU.

    All ranks must call it. A rank with ``keep=False`` takes part and returns an empty dict.
    """
    gathered = {}
    for name, parameter in parameters:
        value = whole(parameter)
        if keep:
            gathered[name] = value.contiguous().cpu()
    return gathered


class PlainState:
    """The state of an optimizer over plain parameters or FSDP2's ``DTensor``s."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """``torch.optim.Optimizer.state_dict`` with whole tensors. All ranks must call it."""
        state = self.optimizer.state_dict()
        return {**state, "state": _map_tensors(state["state"], whole)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of the form that ``state_dict`` returns. Each rank keeps its share."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        shared = {
            index: {key: _share_like(value, parameters[index]) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        self.optimizer.load_state_dict({**state, "state": shared})

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that this rank holds."""
        return _state_tensors(self.optimizer.state)


class ZeroState:
    """The state of an AdamW over the flat shares of parameters that ZeRO-2 and ZeRO-3 use."""

    def __init__(self, optimizer: Any, groups: list[list[nn.Parameter]], rank: int) -> None:
        """``groups`` are the parameters of each group, before accelerate prepared the optimizer."""
        self.zero, self.rank = optimizer, rank
        self.parameters = [parameter for group in groups for parameter in group]
        self._sizes = [len(group) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        """See ``PlainState.state_dict``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = [values["step"] for values in self.zero.optimizer.state.values()]
        state = {}
        for index, parameter in enumerate(self.parameters if steps else ()):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            state[index] = {"step": steps[0].clone(), **moments}
        return {"state": state, "param_groups": self._groups()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``PlainState.load_state_dict``."""
        if not state["state"]:
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        step = next(iter(state["state"].values()))["step"]
        self._allocate(step)
        for index, parameter in enumerate(self.parameters):
            for key in MOMENTS:
                value = state["state"][index][key].to(parameter.device)
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, self._own_part(value, parameter), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that this rank holds, its flat share of the parameters included."""
        return [*self._flat_parameters(), *_state_tensors(self.zero.optimizer.state)]

    def _flat_parameters(self) -> list[torch.Tensor]:
        flat = getattr(self.zero, "fp32_partitioned_groups_flat", None)
        return self.zero.single_partition_of_fp32_groups if flat is None else flat

    def _own_part(self, value: torch.Tensor, parameter: Any) -> torch.Tensor:
        size = parameter.partition_numel()
        flat = value.flatten()[self.rank * size : (self.rank + 1) * size]
        return nn.functional.pad(flat, (0, size - len(flat)))

    def _allocate(self, step: torch.Tensor) -> None:
        """Allocate what AdamW allocates in its first step, and set its step count."""
        for tensor in self._flat_parameters():
            moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
            self.zero.optimizer.state[tensor] = {"step": step.to(tensor.device, copy=True), **moments}
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._lazy_init_hp_params_optimizer_state()

    def _groups(self) -> list[dict[str, Any]]:
        groups, first = [], 0
        for group, size in zip(self.zero.optimizer.param_groups, self._sizes, strict=True):
            rest = {key: value for key, value in group.items() if key != "params"}
            groups.append({**rest, "params": list(range(first, first + size))})
            first += size
        return groups


class Trainee:
    """A stage's model and optimizer, as accelerate prepared them for the chosen engine.

    Attributes:
        model: the plain model. Under FSDP2 and ZeRO-3 its weights are shares.
        engine: the wrapped model, which runs the forward pass of a training step.
        optimizer: the wrapped optimizer.
    """

    def __init__(self, accelerator: Accelerator, model: BabyDoctor, optimizer: torch.optim.Optimizer) -> None:
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.model = model
        # Every rank has read the frozen weights itself. DDP would send them from rank 0 again, 13 GB for a 7B model.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)
        # A decoder layer's weights are gathered together. Its class depends on the family.
        layer_class = type(model.language_model.model.layers[0])
        if strategy_of(accelerator) == "fsdp":
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [layer_class.__name__]
        if strategy_of(accelerator) == "zero3":
            from deepspeed.utils import set_z3_leaf_modules

            set_z3_leaf_modules(model, [layer_class])
        self.engine, self.optimizer = accelerator.prepare(model, optimizer)
        self.is_main = accelerator.is_main_process
        self._state: PlainState | ZeroState
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._state = ZeroState(self.optimizer.optimizer, groups, accelerator.process_index)
        else:
            self._state = PlainState(self.optimizer.optimizer)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state from a checkpoint."""
        self._state.load_state_dict(state)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Give every rank the whole model inside the block, so that a single rank can run ``model``.

        All ranks must enter it. Nothing is gathered if weights are not sharded.
        """
        if isinstance(self.model, FSDPModule):
            parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
            self.model.set_reshard_after_forward(False)
            for part in parts:
                part.unshard()
            yield
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.model, recurse=False)
        elif any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            import deepspeed

            hooks = self.optimizer.optimizer.parameter_offload
            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                hooks._remove_module_hooks()
                yield
                hooks.setup_zero_stage3_hooks()
        else:
            yield

    def optimizer_tensors(self) -> list[torch.Tensor]:
        """The optimizer's tensors as this rank holds them: its state, and ZeRO's flat copy of its parameters."""
        return self._state.tensors()

    def gather_trained(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name, in the main process. All ranks must call it."""
        return gather(self.model.trainable_parameters().items(), keep=self.is_main)

    def gather_weights(self) -> dict[str, torch.Tensor]:
        """What a finished run stores: trained parameters and projector. See ``gather_trained``."""
        named = self.model.named_parameters()
        kept = [(name, p) for name, p in named if p.requires_grad or name.startswith("projector.")]
        return gather(kept, keep=self.is_main)

    def gather_optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state in the form of ``torch.optim.Optimizer.state_dict``. All ranks must call it."""
        return self._state.state_dict()


def _state_tensors(state: Mapping[Any, dict[str, Any]]) -> list[torch.Tensor]:
    values = [value for entry in state.values() for value in entry.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    return value


def _share_like(value: Any, parameter: nn.Parameter) -> Any:
    """This rank's share of ``value`` if FSDP2 shards ``parameter`` and both have the same shape, else ``value``."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
