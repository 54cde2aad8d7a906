"""Training checkpoints: what is needed to go on exactly where a run stopped.

``checkpoints/step-N/`` holds ``trainable.safetensors`` (parameters in training precision),
``optimizer.safetensors`` with ``state.json`` (its numbers, the step, the data fingerprint). The step is the data
cursor and seeds the random generators, so neither needs a file of its own. No pickles.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from babydoctor.files import atomic_directory, write_json
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import UserError


@dataclass(frozen=True)
class Cursor:
    """Where a run stands: optimiser steps and samples done, over all ranks."""

    step: int
    samples: int
    data_fingerprint: str


def save_snapshot(run: Path, model: BabyDoctor, optimizer: torch.optim.Optimizer, cursor: Cursor, *, keep: int) -> Path:
    """Write ``checkpoints/step-N`` atomically, then delete all but the newest ``keep``."""
    path = run / "checkpoints" / f"step-{cursor.step}"
    tensors, numbers = _split_optimizer_state(optimizer)
    with atomic_directory(path) as directory:
        parameters = {name: p.detach().contiguous().cpu() for name, p in model.trainable_parameters().items()}
        save_file(parameters, directory / "trainable.safetensors")
        save_file(tensors, directory / "optimizer.safetensors")
        write_json(directory / "state.json", {**cursor.__dict__, "optimizer": numbers})
    for old in list_snapshots(run)[:-keep]:
        shutil.rmtree(old)
    return path


def list_snapshots(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Half-written ones have another name."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_snapshot(path: Path, model: BabyDoctor, optimizer: torch.optim.Optimizer) -> Cursor:
    """Put a checkpoint's parameters and optimizer state in place.

    Raises:
        UserError: it was written by a model with other trainable parameters.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    parameters = model.trainable_parameters()
    saved = load_file(path / "trainable.safetensors")
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())[0]
        raise UserError(f"{path} does not fit the model: {odd!r} is in one and not in the other")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    numbers = state.pop("optimizer")
    optimizer.load_state_dict(_join_optimizer_state(load_file(path / "optimizer.safetensors"), numbers))
    return Cursor(**state)


def _split_optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by their path (``0/exp_avg``) and the rest as JSON: parameter groups and numbers.

    bitsandbytes nests its quantised moments one level deeper than torch does.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous()
        elif isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{path}/{key}", inner)
        else:
            scalars[path] = value

    for index, values in state["state"].items():
        visit(str(index), values)
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def _join_optimizer_state(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    state: dict[Any, Any] = {}
    for path, value in (*tensors.items(), *numbers["scalars"].items()):
        index, *parents, key = path.split("/")
        place = state.setdefault(int(index), {})
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in numbers["param_groups"]]
    return {"state": state, "param_groups": groups}
