"""Training checkpoints: everything a run needs to continue with bit-equal results.

::

    checkpoints/step-N/
      trainable.safetensors   the trained parameters in training precision
      optimizer.safetensors   the optimizer's tensors; a tensor that several parameters share is stored once
      state.json              the optimizer's numbers, step, samples, data fingerprint
      checksums.sha256        one line per file above, for `sha256sum -c checksums.sha256`

The step number determines the position in the data and seeds the random generators, so neither needs a file. Nothing
is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from babydoctor.files import atomic_directory, explain_full_disk, remove_leftovers, sha256, write_json, write_text
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.model.tensor_files import load_tensors, save_tensors
from babydoctor.schema import UserError

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.sha256"
_FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")
_DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True)
class TrainState:
    """The position of a run: optimizer steps and samples so far, over all ranks, and the fingerprint of its rows."""

    step: int
    samples: int
    data_fingerprint: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's contents: the trained parameters, the optimizer's tensors by path, and its numbers."""

    parameters: dict[str, torch.Tensor]
    optimizer_tensors: dict[str, torch.Tensor]
    optimizer_numbers: dict[str, Any]

    def optimizer_state(self) -> dict[str, Any]:
        """The state in the form of ``torch.optim.Optimizer.state_dict``."""
        return _join_optimizer_state(self.optimizer_tensors, self.optimizer_numbers)


def save_checkpoint(
    run: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer_state: dict[str, Any],
    state: TrainState,
    *,
    keep: int,
) -> Path:
    """Write ``checkpoints/step-N`` atomically, then delete all but the newest ``keep`` checkpoints.

    Args:
        parameters: the trained parameters by name.
        optimizer_state: in the form of ``torch.optim.Optimizer.state_dict``.
        keep: number of newest checkpoints to keep, this one included.

    Raises:
        UserError: the disk is full. Earlier checkpoints are intact.
    """
    path = run / "checkpoints" / f"step-{state.step}"
    tensors, numbers = _split_optimizer_state(optimizer_state)
    parameters = {name: value.detach().contiguous().cpu() for name, value in parameters.items()}
    size = sum(tensor.nbytes for tensor in (*parameters.values(), *tensors.values()))
    what = f"the checkpoint of step {state.step} ({size / 1e9:.2f} GB)"
    with explain_full_disk(what, run, _full_disk_hint(run)), atomic_directory(path) as directory:
        save_tensors(parameters, directory / "trainable.safetensors")
        save_tensors(tensors, directory / "optimizer.safetensors")
        write_json(directory / "state.json", {**dataclasses.asdict(state), "optimizer": numbers})
        write_text(directory / CHECKSUMS, "".join(f"{sha256(directory / name)}  {name}\n" for name in _FILES))
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def _full_disk_hint(run: Path) -> str:
    saved = list_checkpoints(run)
    if not saved:
        return "free some space or choose another output_dir; the run has no checkpoint yet"
    return f"free some space and continue from {saved[-1]} with --resume"


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_damage(checkpoint: Path) -> str | None:
    """Compare a checkpoint's files with its checksums. Return the first mismatch as text, or None if all match."""
    try:
        lines = (checkpoint / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    if sorted(expected) != sorted(_FILES):
        return f"{CHECKSUMS} does not list {', '.join(_FILES)}"
    for name, digest in expected.items():
        try:
            if sha256(checkpoint / name) != digest:
                return f"{name} does not match its checksum in {CHECKSUMS}"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def find_newest_intact(run: Path) -> Path | None:
    """Find the newest checkpoint whose checksums match; None if the run has no checkpoint.

    Newer checkpoints that are damaged are renamed to ``step-N.damaged`` with a warning, so that they are neither
    counted nor in the way of new ones. Leftovers of half-written checkpoints are deleted.

    Raises:
        UserError: every checkpoint is damaged.
    """
    remove_leftovers(run / "checkpoints")
    checkpoints = list_checkpoints(run)
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint)
        if damage is None:
            for path, why in damaged:
                _set_aside(path)
                logger.warning("%s is damaged: %s; training continues from %s instead", path, why, checkpoint.name)
            return checkpoint
        damaged.append((checkpoint, damage))
    if damaged:
        raise UserError(
            "every checkpoint of the run is damaged: "
            + "; ".join(f"{path}: {why}" for path, why in damaged)
            + f". Restore one from a copy, or delete {run / 'checkpoints'} to train from the start"
        )
    return None


def _set_aside(checkpoint: Path) -> None:
    target = checkpoint.with_name(checkpoint.name + _DAMAGED_SUFFIX)
    shutil.rmtree(target, ignore_errors=True)
    checkpoint.rename(target)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into CPU memory."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    parameters, tensors = (load_tensors(path / f"{name}.safetensors") for name in ("trainable", "optimizer"))
    return Checkpoint(parameters, tensors, values["optimizer"])


@torch.no_grad()
def load_parameters(checkpoint: Checkpoint, model: BabyDoctor) -> None:
    """Copy a checkpoint's parameters into a model whose weights are not sharded yet.

    Raises:
        UserError: the checkpoint was written by a model with other trainable parameters.
    """
    parameters = model.trainable_parameters()
    if unmatched := sorted(checkpoint.parameters.keys() ^ parameters.keys()):
        raise UserError(
            f"the checkpoint does not fit the model: {unmatched[0]!r} is in one and not in the other; resume with the "
            "run's own settings"
        )
    for name, parameter in parameters.items():
        parameter.copy_(checkpoint.parameters[name])


def read_state(path: Path) -> TrainState:
    """Read the position of the run at a checkpoint."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    del values["optimizer"]
    return TrainState(**values)


def _split_optimizer_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state into CPU tensors by path (``0/exp_avg``) and everything else, which fits JSON.

    bitsandbytes nests its quantized moments one level deeper than torch does, and all its parameters share two
    quantization maps. Each tensor is stored once; ``shared`` maps the paths of its other uses to the first one.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    shared: dict[str, str] = {}
    first_path: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()

    def visit_tensor(path: str, value: torch.Tensor) -> None:
        storage = (value.device, value.untyped_storage().data_ptr())
        identity = (*storage, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and identity in first_path:
            shared[path] = first_path[identity]
            return
        first_path[identity] = path
        # safetensors refuses two tensors in one storage, even if they are disjoint views.
        copy = value.numel() > 0 and storage in storages
        storages.add(storage)
        tensors[path] = value.detach().to("cpu", copy=copy).contiguous()

    def visit(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            visit_tensor(path, value)
        elif isinstance(value, dict):
            for key in sorted(value):
                visit(f"{path}/{key}", value[key])
        else:
            scalars[path] = value

    for index in sorted(state["state"]):  # the order of a loaded state differs from that of a new one
        visit(str(index), state["state"][index])
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars, "shared": shared}


def _join_optimizer_state(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``_split_optimizer_state``. Shared tensors become one object again."""
    shared = {path: tensors[first] for path, first in numbers["shared"].items()}
    state: dict[Any, Any] = {}
    for path, value in (*tensors.items(), *shared.items(), *numbers["scalars"].items()):
        index, *parents, key = path.split("/")
        place = state.setdefault(int(index), {})
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in numbers["param_groups"]]
    return {"state": state, "param_groups": groups}
