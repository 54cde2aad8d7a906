"""Reading a transformers checkpoint tensor by tensor, so that a 7B model never needs its size twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from babydoctor.hub import model_directory
from babydoctor.schema import UserError


def local_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The directory itself, or the local copy of a model on the hub; see ``hub.model_directory``."""
    return model_directory(path, weights=weights)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a checkpoint: safetensors where there are any, else ``pytorch_model*.bin``."""
    for pattern, index_name in (
        ("model*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = directory / index_name
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise UserError(f"{index} names {', '.join(missing)}, which is not in {directory}; copy it there")
            return [directory / name for name in names]
        if files := sorted(directory.glob(pattern)):
            return files
    raise UserError(f"{directory} holds no model*.safetensors and no pytorch_model*.bin")


def iterate_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight by name, memory-mapped, one file at a time."""
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        else:
            yield from load_pickle(path).items()


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a ``.bin`` file of tensors; anything in it that is not plain data is refused.

    Raises:
        UserError: the pickle asks for code to be run, or does not hold tensors by name.
    """
    import pickle
    import zipfile

    try:
        # Files from before torch 1.6 are no zip archives and cannot be memory-mapped.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(
            f"{path} is refused: it is damaged or holds more than plain tensors, and opening it could run code "
            f"({str(error).splitlines()[0]}). Convert it to safetensors where you trust it."
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors")
    return weights
